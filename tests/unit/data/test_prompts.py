"""Prompts alone: what counts as one, and that each keeps its side of a split."""

import json
from pathlib import Path

import pytest

from decant.data.captioned import split
from decant.data.source import find, read
from decant.errors import UserError


def _file(folder: Path, entries: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "captions.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return file


def test_prompts_are_read_in_order_and_called_by_their_words(tmp_path: Path) -> None:
    file = _file(tmp_path / "set", [{"text": "  a  cat\n"}, {"caption": "a dog", "id": 3}, "a bare string"])
    found = read(file)
    assert found.captions == found.names == ("a cat", "a dog", "a bare string")
    assert found.alone and not found.skipped
    assert read(tmp_path / "set").captions == found.captions
    assert "prompts alone" in find(file).told


def test_what_is_no_prompt_is_skipped_with_its_place_and_reason(tmp_path: Path) -> None:
    entries = [{"text": f"prompt {n}"} for n in range(30)]
    bad = [
        {"text": 7},
        {"text": " "},
        {"text": None},
        {"words": "x"},
        5,
        ["x"],
        {"text": "\ud800"},
        {"text": "prompt 3"},
    ]
    found = read(_file(tmp_path, [*entries, *bad]), max_skipped=0.5)
    assert len(found.files) == 30
    assert {item.name: item.reason for item in found.skipped} == {
        "captions.json[30]": "the caption is not text (int)",
        "captions.json[31]": "the caption is empty",
        "captions.json[32]": "no caption",
        "captions.json[33]": "no caption",
        "captions.json[34]": "no caption",
        "captions.json[35]": "no caption",
        "captions.json[36]": "the caption is not text in UTF-8",
        "prompt 3": "listed twice",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [("[{]", "no JSON"), ("[]", "it is empty"), ("", "no JSON"), ('"words"', "no list"), ("[1, 2]", "no caption")],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"{said}[\s\S]*allowed:[\s\S]*hint:"):
        read(_file(tmp_path, text))


def test_a_prompt_keeps_its_side_as_the_file_grows(tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(60)]
    train, held = split(read(_file(tmp_path, prompts[:40])), 0.3, 1)
    more = split(read(_file(tmp_path, prompts[::-1])), 0.3, 1)
    assert set(train.captions) <= set(more[0].captions) and set(held.captions) <= set(more[1].captions)
    assert train.alone and held.alone


def test_the_fingerprint_follows_the_file(tmp_path: Path) -> None:
    first = find(_file(tmp_path, ["a", "b"])).fingerprint()
    assert find(_file(tmp_path, ["a", "b"])).fingerprint() == first
    assert find(_file(tmp_path, ["a", "c"])).fingerprint() != first
