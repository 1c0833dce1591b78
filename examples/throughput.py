"""How much of a bare loop's pace decant's loop keeps, and where the rest goes.

    python examples/throughput.py --page docs/throughput.md --json docs/throughput.json
    python examples/throughput.py --compile --fast-products --rounds 12 --steps 10

Both loops (examples/bare_kd.py; decant's own with what `decant distill` does around it: data from the cache, draws,
caption dropout, clipping, checks, average, losses on disk, progress) train the same student of the same teacher at the
same batch, turn by turn in one process, so that whatever else the machine does hits both. Run it alone all the same.
Freed memory is kept as the command line keeps it, for both.
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bare_kd import Inputs as Given
from bare_kd import Networks, networks, options
from bare_kd import steps as bare_steps

from decant.bench.machine import machine
from decant.cli.memory import keep_freed_memory
from decant.data.latents import Latents
from decant.data.order import stream
from decant.data.source import read
from decant.maths.ramp import value_at
from decant.methods.kd import KD, Knobs
from decant.models.device import pick
from decant.models.families.sd1 import SD1
from decant.models.load import load
from decant.scenes.folder import draw_folder
from decant.stages.curve import Curve
from decant.stages.encode import encode_data
from decant.stages.progress import progress
from decant.stages.stage import Inputs
from decant.train import loop as training
from decant.train.draw import Draw
from decant.train.ema import EMA
from decant.train.loop import Step, loop
from decant.train.state import RunSettings, TrainState

ENDLESS = 1_000_000
# Where a step of decant's loop spends what the bare loop does not have: (part, owner of the function, its name).
PARTS: list[tuple[str, Any, str]] = [
    ("batch from the cache", Latents, "batch"),
    ("draws", Draw, "_generators"),
    ("draws", Draw, "normal"),
    ("draws", Draw, "uniform"),
    ("switching of gradients", TrainState, "focus"),
    ("clipping, losses and gradient checked", training, "_clip"),
    ("average (EMA)", EMA, "update"),
    ("means of losses, parameters checked", training, "_finish"),
    ("losses on disk", Curve, "add"),
    ("optimiser and average (the bare loop has the optimiser)", TrainState, "advance"),
]


def prepared(args: argparse.Namespace, folder: Path) -> tuple[SD1, Latents, Networks]:
    """Scenes, encoded as `decant distill` does, and the networks."""
    pipeline = load(args.teacher)
    size = int(pipeline.unet.config["sample_size"]) * pipeline.vae_scale_factor
    captioned = read(draw_folder(folder / "scenes", args.pictures, "train"))
    inputs = Inputs(args.teacher, {}, None, 0, folder / "work", talk)
    family = SD1.of(pipeline)
    data = encode_data(family, captioned, size, inputs, pick(args.device))
    return family, data, networks(args.teacher, args.student)


def decant_steps(
    family: SD1, data: Latents, nets: Networks, args: argparse.Namespace, work: Path
) -> tuple[KD, Iterator[Step]]:
    """decant's loop with what the distill stage does around a step."""
    knobs = Knobs(task=0.0, feature=args.feature, caption_dropout=0.15, ema=0.98)
    method = KD.of(family, nets[1], nets[0], nets[2], knobs)
    run = RunSettings(
        steps=ENDLESS, lr=args.lr, precision=args.precision, compile=args.compile, fast_products=args.fast_products
    )
    state = TrainState.start(method, run, device=args.device)

    def endless() -> Iterator[Step]:
        with Curve(work / "losses.jsonl", 0, ENDLESS) as curve, progress("distilling", ENDLESS, lambda _: None) as tick:
            for step in loop(method, lambda number: [data.batch(stream(0, number, args.batch, data.n))], state):
                curve.add(step)
                tick(step.step, f"loss {step.total:.4f}  {step.images_per_second:.1f} pictures/s")
                yield step

    return method, endless()


def first_inputs(method: KD, data: Latents, args: argparse.Namespace) -> Given:
    """What decant's loop sees in its first step, for the bare loop to see in every step."""
    samples = stream(0, 0, args.batch, data.n)
    batch, draw = data.batch(samples), Draw(0, 0, samples)
    x_t, t, _ = method._corrupted(batch, draw, 0.0)
    return Given(
        x_t, t, method._condition(batch, draw, value_at(method.knobs.caption_dropout, 0.0))["encoder_hidden_states"]
    )


def block_ms(steps: Iterator[Any], count: int) -> tuple[float, float]:
    """Milliseconds a step, over ``count`` steps: by the wall clock, and of the processor's time."""
    synchronize()
    begin = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(steps)
    synchronize()
    end = time.perf_counter(), time.process_time()
    return (end[0] - begin[0]) * 1000 / count, (end[1] - begin[1]) * 1000 / count


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds in each of PARTS while the block runs, of the processor's time on a CPU; a part in itself counts once."""
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    seconds: dict[str, float] = defaultdict(float)
    inside: set[str] = set()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if part in inside:
                return function(*args, **kwargs)
            inside.add(part)
            synchronize()
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                seconds[part] += clock() - begin
                inside.discard(part)

        return call

    with ExitStack() as stack:
        for part, owner, name in PARTS:
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both loops, which begins alternating; then a profile of decant's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family, data, nets = prepared(args, folder)
        own = copy.deepcopy(nets)
        method, ours = decant_steps(family, data, nets, args, folder)
        bare = bare_steps(own, first_inputs(method, data, args), args)
        talk("warming up, compiling if asked to")
        first = {"bare": float(next(bare)), "decant": next(ours).total}
        for warm in (bare, ours):
            block_ms(warm, args.warmup)
        rounds = []
        for number in range(args.rounds):
            pair = [("bare", bare), ("decant", ours)]
            rounds.append({side: block_ms(steps, args.steps) for side, steps in (pair if number % 2 else pair[::-1])})
            told = ", ".join(f"{side} {wall:.1f} ms" for side, (wall, _) in rounds[-1].items())
            talk(f"round {number + 1}/{args.rounds}: {told}")
        with clocks() as seconds:
            wall_ms, processor_ms = block_ms(ours, args.steps)
    clock_names = ("wall", "processor")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "conditions": {key: value for key, value in vars(args).items() if key not in ("json", "page")},
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "first_loss": first,
        "ms": {
            clock: {side: spread([each[side][at] for each in rounds]) for side in ("bare", "decant")}
            for at, clock in enumerate(clock_names)
        },
        "percent_of_bare": {
            clock: spread([100 * each["bare"][at] / each["decant"][at] for each in rounds])
            for at, clock in enumerate(clock_names)
        },
        "profiled_ms": wall_ms if torch.cuda.is_initialized() else processor_ms,
        "parts_ms": {part: value * 1000 / args.steps for part, value in seconds.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    on, of = found["machine"], found["conditions"]
    place = on["processor"] if on["accelerator"] == "none" else on["accelerator"]
    rows = [
        f"| {part} | {value:.2f} | {100 * value / found['profiled_ms']:.2f} |"
        for part, value in sorted(found["parts_ms"].items(), key=lambda pair: -pair[1])
    ]

    def told(figure: dict[str, float]) -> str:
        return f"{figure['median']:.1f} ({figure['low']:.1f}-{figure['high']:.1f})"

    return "\n".join(
        [
            "# Training throughput",
            "",
            f"Written by `{found['command']}`.",
            "",
            f"Teacher {of['teacher']}, student {of['student']}, batch {of['batch']}, precision {of['precision']}, "
            f"compile {of['compile']}, fast products {of['fast_products']}; {on['threads']} threads on {place}, "
            f"torch {on['torch']}; load {found['load_average']:.1f} at the end.",
            f"{of['rounds']} rounds of {of['steps']} steps of each loop in turn, after {of['warmup'] + 1} steps of "
            "warm-up. Medians, and range in brackets. The share is taken round by round. Processor time is what the "
            "process itself computed: other work on the machine costs it less.",
            "",
            "| | bare loop, ms a step | decant's loop, ms a step | of the bare loop's pace, % |",
            "|---|---|---|---|",
            *(
                f"| {clock} time | {told(found['ms'][clock]['bare'])} | {told(found['ms'][clock]['decant'])} "
                f"| {told(found['percent_of_bare'][clock])} |"
                for clock in ("wall", "processor")
            ),
            "",
            "What decant's loop does beside networks and optimiser, from one more block with clocks in it:",
            "",
            "| part | ms a step | of the step, % |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure, and write what is asked for."""
    parser = options()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(words)
    keep_freed_memory()
    found = measure(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.page:
        args.page.write_text(page(found))
    print(page(found))
    return found


if __name__ == "__main__":
    main()
