"""Documents as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

_ENDS = ("value", "low", "high")


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
        turns += ", compiled" if measured.get("compile") else ""
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


def compare_table(document: Mapping[str, Any]) -> str:
    """What `decant compare` measured, a line an arm, and below it the conditions and what was not measured."""
    keys = [key for key in document["columns"] if key != "agreement_with_teacher"]
    head = ("", "steps", "sampler", "guidance", "ms a picture", "speedup", *(key.replace("_", " ") for key in keys))
    main = document["main_score"]
    head = (*head, f"of teacher's {main.replace('_', ' ')}") if main else head
    rows = [head, *(_arm_row(entry, keys, document) for entry in document["models"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    missing = [f"{item['score']}: not measured: {item['reason']}; {item['hint']}" for item in document["left_out"]]
    return "\n".join([*lines, "", *_compared(document), *missing])


def _arm_row(entry: Mapping[str, Any], keys: Sequence[str], document: Mapping[str, Any]) -> tuple[str, ...]:
    speedup, main = entry.get("speedup"), document["main_score"]
    row = [entry["model"], str(entry["steps"]), entry["sampler"], f"{entry['guidance_scale']:g}"]
    row += [_spread(entry["latency_ms"].get("picture")), f"{speedup['value']:.3g}x" if speedup else "-"]
    row += [_scored(entry["scores"].get(key), key) for key in keys]
    return (*row, _part(entry["scores"].get(main))) if main else tuple(row)


def _scored(figure: Mapping[str, Any] | None, key: str) -> str:
    if figure is None:
        return "not measured" if key == "clip_score" else "-"
    share = "unit" not in figure
    numbers = [f"{100 * figure[end]:.1f}" if share else f"{figure[end]:.3g}" for end in _ENDS if end in figure]
    value, *ends = [f"{number}%" if share and at == 0 else number for at, number in enumerate(numbers)]
    return f"{value} ({'-'.join(ends)})" if ends else value


def _part(figure: Mapping[str, Any] | None) -> str:
    if figure is None or "relative_to_teacher" not in figure:
        return "-"
    ends = [f"{100 * figure[end]:.1f}" for end in ("relative_low", "relative_high") if end in figure]
    return f"{100 * figure['relative_to_teacher']:.1f}%" + (f" ({'-'.join(ends)})" if ends else "")


def _compared(document: Mapping[str, Any]) -> list[str]:
    machine, images, n = document["machine"], document["images"], len(document["prompts"])
    cut = [item for item in document["prompts"] if item["unread"]]
    lines = [
        f"{n} prompts x {images} images, seed {document['seed']}; in brackets 95 % intervals over prompts, paired with "
        f"the teacher's; times: median (range), {machine['processor']}, {machine['threads']} threads, accelerator "
        f"{machine['accelerator']}, torch {machine['torch']}"
    ]
    if cut:
        lines.append(
            f"{len(cut)} prompts are longer than the text encoder reads, such as the end of one: {cut[0]['unread']!r}"
        )
    return lines


def votes_table(document: Mapping[str, Any]) -> str:
    """What people preferred in a blind test, a line an arm."""
    lines = [f"{document['votes']} votes of {document['voters']} on {document['pairs']} pairs"]
    for arm in document["arms"]:
        told = f"{arm['name']}: preferred to {document['reference']} in "
        if arm["preference"]:
            own = arm["preference"]
            share = f"{100 * own['value']:.1f}% ({100 * own['low']:.1f}-{100 * own['high']:.1f})"
            told += f"{share} of {own['n']} pairs decided"
        else:
            told += "none decided"
        lines.append(f"{told}; {arm['wins']} won, {arm['losses']} lost, {arm['ties']} ties")
    return "\n".join(lines)
