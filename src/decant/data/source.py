"""The door for data: looks at what ``--data`` names, and says which kind of source it is."""

from pathlib import Path

from decant.data import coco, folder, huggingface, prompts, webdataset
from decant.data.captioned import Captioned, Source, Watch, check_share, unwatched
from decant.errors import nearest, refuse

Data = str | Path
"""What ``--data`` names, as it was given."""

# The first that knows what it is given takes it; a folder of pictures is what every other folder must be.
_KINDS = (huggingface.find, webdataset.find, coco.find, prompts.find, folder.find)
_ALLOWED = (
    "a folder of pictures with captions, COCO's captions_*.json or its folder, .tar shards, captions.json, parquet, "
    "or hf:owner/name"
)


def find(data: Data) -> Source:
    """The source that ``data`` names. No picture is read.

    Raises:
        UserError: it is not there, or is nothing that can be read.
    """
    said = str(data)
    for kind in _KINDS:
        source = kind(said)
        if source is not None:
            return source
    path = Path(said)
    beside = path.parent
    known = sorted(entry.name for entry in beside.iterdir()) if beside.is_dir() else []
    hint = nearest(path.name, known) if known and not path.exists() else "docs/guides/data.md shows every kind"
    what = "is no data that can be read" if path.exists() else "does not exist"
    raise refuse("--data", f"{said} {what}", allowed=_ALLOWED, hint=hint)


def read(data: Data, max_skipped: float = 0.1, watch: Watch = unwatched, index: Path | None = None) -> Captioned:
    """The pictures of a source, each looked at once.

    ``watch(done, total)`` counts entries; ``index`` is a folder that may keep what was seen. Raises ``UserError`` where
    there is nothing to be used, or more than the fraction ``max_skipped`` of the entries (0.1: one in ten) cannot be.
    """
    source = find(data)
    captioned = source.scan(watch, index)
    check_share(captioned, max_skipped, needs=source.needs)
    return captioned
