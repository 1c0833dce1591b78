"""Files of prompts: blank lines, doubles, encodings, JSON; and what of a prompt is not read."""

import json
from pathlib import Path

import pytest

from decant.data.prompt_file import own_prompts, prompt_list, read_prompts
from decant.errors import UserError


def test_blank_lines_and_doubles_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa  cat\r\n\r\n   \r\na dog \r\na cat\r\nein Käse\r\n".encode())
    found = read_prompts(file)
    assert found.prompts == ("a cat", "a dog", "ein Käse")
    assert found.skipped == {"blank": 2, "said before": 1}


def test_captions_json_is_a_prompt_file_too(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps([{"text": "a cat"}, "a dog", {"text": " "}, {"text": "a cat"}, {"image": 3}]))
    found = read_prompts(file)
    assert found.prompts == ("a cat", "a dog") and sum(found.skipped.values()) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "it is empty"), (b"\n \n", "2 blank"), (b"caf\xe9", "no text in UTF-8"), (b"x" * 70_000, "1 the caption")],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_prompts(file)
    with pytest.raises(UserError, match="hint:"):
        read_prompts(tmp_path / "absent.txt")


def test_ours_are_twenty_and_each_is_said_once() -> None:
    assert len(own_prompts()) == 20 == len(prompt_list(own_prompts(), "ours").prompts)
