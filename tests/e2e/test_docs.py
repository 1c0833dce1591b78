"""Every code block of the README and of docs/ runs, and what is generated is current.

``bash`` blocks run in a temporary folder in which the names that the pages use (path/to/teacher, path/to/pictures) are
real small folders; ``python`` blocks are executed; ``yaml`` blocks must be recipes, ``json`` blocks JSON. ``text`` is
output, and is not run. An HTML comment before a block makes it small, for every reader to see:

    <!-- test adds: WORDS -->              WORDS are appended to every decant command of the block
    <!-- test runs instead: COMMAND -->    COMMAND runs in the block's place
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import ControlNetModel, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from decant.cli.main import main
from decant.recipe.runner import resolve
from decant.recipe.schema import load_recipe
from decant.scenes.folder import draw_folder
from decant.stages.all import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = set("|<>&;$`*")
_COMMENT = re.compile(r"<!-- test (adds|runs instead): (.*?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what the comment before it asks for."""

    page: Path
    line: int
    language: str
    text: str
    adds: tuple[str, ...] = ()
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if re.match(r"\s*```", line)]
    assert len(fences) % 2 == 0, f"{page}: a block is not closed"
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        comment = _COMMENT.match(lines[begin - 1]) if begin else None
        kind, words = comment.groups() if comment else ("", "")
        adds = tuple(shlex.split(words)) if kind == "adds" else ()
        text = "\n".join(lines[begin + 1 : end])
        language = lines[begin].strip().strip("`")
        yield Block(page, begin + 1, language, text, adds, words if kind == "runs instead" else "")


WITH_BLOCKS = [page for page in PAGES if any(block.language != "text" for block in blocks_of(page))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: teacher, fifty pictures, examples, Makefile, and a shell's `decant`."""
    base = tmp_path_factory.mktemp("docs")
    (base / "path" / "to").mkdir(parents=True)
    shutil.copytree(str(files("decant.scenes") / "teacher"), base / "path" / "to" / "teacher")
    draw_folder(base / "path" / "to" / "pictures", 50, "train")
    _made_for_the_teacher(base / "path" / "to")
    for name in ("examples", "Makefile", "requirements.txt", "pyproject.toml"):
        (base / name).symlink_to(ROOT / name)
    programs = base / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "decant").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m decant.cli.main "$@"\n')
    (programs / "decant").chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
    return base


def _made_for_the_teacher(where: Path) -> None:
    """A LoRA and a ControlNet as diffusers writes them, untrained."""
    pipeline = StableDiffusionPipeline.from_pretrained(where / "teacher")
    ControlNetModel.from_unet(pipeline.unet).save_pretrained(where / "controlnet")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(where, layers, weight_name="lora.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README comes first, and the other pages go on from the run that it makes."""
    monkeypatch.chdir(base)
    monkeypatch.setenv("PATH", f"{base / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        match block.language:
            case "bash":
                _run_bash(block)
            case "python":
                exec(compile(block.text, str(block), "exec"), names)
            case "yaml":
                _check_recipe(block, base)
            case "json":
                json.loads(block.text)
            case "text":
                pass
            case other:
                pytest.fail(f"{block}: no way to run {other!r}; write text if it is output")


def _run_bash(block: Block) -> None:
    """Plain decant commands in this process, since importing torch costs seconds; everything else in a shell."""
    text = block.instead or re.sub(r"\\\n\s*", " ", block.text)
    for line in filter(None, map(str.strip, text.splitlines())):
        words = shlex.split(line, comments=True)
        if words[:1] == ["decant"] and not SHELL & set(line):
            _run_decant([*words[1:], *block.adds], f"{block}: {line}")
        elif words:
            done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block}: {line}\n{done.stdout}{done.stderr}"


def _run_decant(words: list[str], told: str) -> None:
    said, talk = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(talk):
        try:
            main(words)
        except SystemExit as stop:
            assert not stop.code, f"{told}\n{said.getvalue()}{talk.getvalue()}"


def _check_recipe(block: Block, base: Path) -> None:
    file = base / "block.yaml"
    file.write_text(block.text, encoding="utf-8")
    assert resolve(load_recipe(file), STAGES), str(block)


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_current(tmp_path: Path) -> None:
    _example("reference").main(tmp_path)
    for page in sorted(tmp_path.iterdir()):
        kept = ROOT / "docs" / "reference" / page.name
        assert kept.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "`make docs` writes it anew"


def test_every_setting_is_explained() -> None:
    silent = [
        f"{name}.{key}"
        for name, stage in STAGES.items()
        for key, field in stage.settings.model_fields.items()
        if not field.description
    ]
    assert silent == []


def test_the_readme_has_the_table_of_the_results() -> None:
    tables = [
        [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
        for name in ("README.md", "docs/results.md")
    ]
    results = [line for line in tables[1] if line.count("|") == 10]
    assert len(results) >= 3 and [line for line in tables[0] if line.count("|") == 10] == results


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_the_picture_is_light() -> None:
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 300_000
