"""What ``--help`` says of every verb and option."""

import re

from decant.cli.main import app

PAGE = app.generate_docs(output_format="markdown", recursive=True)


def test_every_option_of_every_verb_is_explained() -> None:
    options = re.findall(r"^\* `([^`]+)`:(.*)$", PAGE, re.MULTILINE)
    assert len(options) > 40
    silent = [name for name, text in options if not re.sub(r"\*.*?\*(?=\s|$)", "", text).strip(" *[]")]
    assert silent == []


def test_no_option_has_a_useless_opposite() -> None:
    assert "--empty-" not in PAGE
