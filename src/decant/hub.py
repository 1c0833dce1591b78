"""Whether the Hugging Face hub can be asked, known within seconds: its clients try a silent network for minutes."""

from typing import Literal

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

_SECONDS = 5.0  # a hub that is silent for so long is away


def why_away(repo_id: str, file: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str:
    """Why the hub cannot be asked for a file, "" where it answers, even if with no."""
    if constants.is_offline_mode():
        return "it is switched off (HF_HUB_OFFLINE)"
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, repo_type=kind, revision=revision), timeout=_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return ""
    except Exception as error:  # of several libraries
        return f"it does not answer ({(str(error) or type(error).__name__).splitlines()[0]})"
    return ""
