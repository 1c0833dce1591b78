"""Write docs/moved.md: a LoRA and a ControlNet of the scenes teacher, moved to its students untrained.

    python examples/moved_table.py LORA_RUN CONTROLNET_RUN

The runs are the --out folders of `move_lora.py measure` and `move_controlnet.py measure`.
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "moved.md"


def main(lora_run: Path, controlnet_run: Path) -> None:
    """Both tables, with how the figures came about."""
    lora, controlnet = (
        json.loads((run / "measured.json").read_text(encoding="utf-8")) for run in (lora_run, controlnet_run)
    )
    lines = [
        "# What moves with the scenes teacher's students",
        "",
        "Written by `python examples/moved_table.py`, from what `examples/move_lora.py` and "
        "`examples/move_controlnet.py` trained, moved with `decant move` and measured. Nothing was trained after it "
        "was moved. Percent with 95 % intervals, captions of held-out scenes, DDIM 25 steps, guidance 4, one seed a "
        "picture.",
        "",
        "`04-base` and `08-tiny` are the quickstart's BK-Base and BK-Tiny; the others are channel students of "
        "[the table of students](students.md), their levels narrowed and every layer kept.",
        "",
        "## A LoRA: one new colour",
        "",
        "The world has no amber; the teacher was never told the word. The LoRA is of the attention of UNet and text "
        f"encoder, {lora['how']}. n = {lora['images']}. Right: the checker reads all that the caption says, amber too.",
        "",
        lora["table"],
        "",
        "## A ControlNet: a map of where things stand",
        "",
        f"A white disc where each thing stands; {controlnet['how']}. n = {controlnet['images']}; by chance one picture "
        "in nine has its things there.",
        "",
        controlnet["table"],
        "",
    ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
