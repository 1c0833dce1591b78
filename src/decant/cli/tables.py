"""Documents as text for people."""

from collections.abc import Mapping
from typing import Any


def bench_table(document: Mapping[str, Any]) -> str:
    """What `decant bench` measured: a line a model, and below it the conditions."""
    head = ("model", "parameters", "GMACs", "text ms", "unet ms", "decode ms", "picture ms", "pictures/s", "memory MB")
    rows = [head, *(_row(model) for model in document["models"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_conditions(document)])


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    latency, rate = model["latency_ms"], model.get("images_per_second")
    name = model["name"] + (f" (as {model['measured_as']})" if "measured_as" in model else "")
    times = [_spread(latency.get(part)) for part in ("text", "unet", "decode", "picture")]
    memory = model.get("peak_memory_mb")
    counts = (name, f"{model['parameters']:,}", f"{model['macs'] / 1e9:.4g}")
    return (*counts, *times, _spread(rate), "-" if memory is None else f"{memory:,.0f}")


def _spread(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else f"{figure['median']:.4g} ({figure['low']:.4g}-{figure['high']:.4g})"


def _conditions(document: Mapping[str, Any]) -> list[str]:
    machine, lines = document["machine"], []
    for model in document["models"]:
        measured = model.get("measured")
        if measured is None or "measured_as" in model:
            continue
        height, width = measured["size"]
        turns = ", in turns with the others" if measured["interleaved"] else ""
        rate = model.get("images_per_second")
        batch = f"; pictures/s at batch {rate['batch_size']}" if rate else ""
        kind = "on the device" if model["peak_memory"]["what"] == "cuda" else "of a process of its own"
        lines.append(
            f"{model['name']}: {measured['device']}, {measured['dtype']}, {height} x {width}, {measured['sampler']} "
            f"{measured['steps']} steps, guidance {measured['guidance_scale']}, batch 1; median (range) of "
            f"{measured['repeats']} after {measured['warmup']} untimed{turns}{batch}; peak memory {kind}, one picture"
        )
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    return [*lines, f"{where}, accelerator {machine['accelerator']}, torch {machine['torch']}"]


def importance_table(document: Mapping[str, Any]) -> str:
    """What `decant importance` measured, the parts that cost most for the least damage first."""
    head = ("part", "kind", "damage", "ms", "parameters", "MMACs")
    parts = sorted(document["parts"], key=lambda part: part["damage"] / max(part["latency_ms"]["median"], 1e-6))
    rows = [head, *(_part_row(part) for part in parts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    machine = document["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"damage: relative change of the output, {document['pictures']} pictures at {document['noise_levels']} "
            f"noise levels, seed {document['seed']}; ms: median (range) of the part in one forward at batch 1, "
            f"{document['size']} px, on {machine['device']} ({machine['processor']}, {machine['threads']} threads)",
        ]
    )


def _part_row(part: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (f"{part['parameters']:,}", f"{part['macs'] / 1e6:,.1f}")
    return (part["name"], part["kind"], f"{part['damage']:.3g}", _spread(part["latency_ms"]), *counts)
