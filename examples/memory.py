"""How much memory a distillation at full size takes with which settings, counted on tensors without numbers.

    python examples/memory.py [--teacher sd15] [--student bk-tiny] [--size 512] [--update 64] [--fit 6GB] [--page PAGE]

No weights are needed, and a few minutes on one core. What `--fit` chooses is counted a second time by torch's own
memory tracker.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type
from torch.utils.weak import WeakIdKeyDictionary

from decant.models.load import condition_tokens, unet_config
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import skeleton
from decant.stages.distill_settings import Distill
from decant.stages.fit import Pair, Peaks, blank_batch, fit, ladder, megabytes, method_maker, told
from decant.stages.training import run_settings
from decant.train.rehearsal import rehearsed


def pair_of(teacher: str, student: Any) -> Pair:
    """A published student and its teacher, by their configs."""
    network = skeleton(unet_config(teacher))
    cut = published(dict(network.config), network.state_dict(), student)
    return Pair(dict(cut.config), dict(network.config), cut.surgery_map, condition_tokens(teacher))


class Tracker(MemTracker):
    """Torch's tracker without its hooks on gradients, which a frozen tensor has none of, and figures of every module.

    They would say of what kind a tensor is and where it was made, in half of the time.
    """

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = False) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation on moments in 8 bits is seen by its parts, as the tracker sees those on distributed tensors."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state: Any) -> None:
        every, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = every


def tracked_mb(settings: Distill, pair: Pair) -> float:
    """The peak of updates in MB by torch's MemTracker."""
    make, tracker = method_maker(settings, pair), Tracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        run, device = run_settings(settings, 0), torch.device("cpu")
        batches = rehearsed(make(), lambda: blank_batch(settings, pair), run, device, settings.accumulation)
        for _ in batches:
            tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e6


def page(asked: argparse.Namespace) -> str:
    """The table and the choice, as a page."""
    pair = pair_of(asked.teacher, asked.student)
    settings = Distill(size=asked.size, batch_size=asked.update, device="cpu")
    peaks, rows = Peaks(pair), []
    for rung in ladder(settings):
        if rung.changes.get("batch_size", asked.update) in (asked.update, 4, 1):
            chosen = settings.model_copy(update=rung.changes)
            rows.append(f"| {told(rung.changes)} | {peaks.mb(chosen) / 1e3:.2f} |")
    said: list[str] = []
    found = fit(settings, pair, megabytes(asked.fit), said.append)
    chosen = settings.model_copy(update=found.changes)
    counted, proof = peaks.updates_mb(chosen), peaks.proof_mb(chosen)
    tracked = tracked_mb(chosen, pair)
    command = f"python examples/memory.py --teacher {asked.teacher} --student {asked.student} --size {asked.size}"
    return "\n".join(
        [
            "# Memory of a distillation at full size",
            "",
            f"Written by `{command} --update {asked.update} --fit {asked.fit} --page docs/memory.md`, torch "
            f"{torch.__version__}.",
            "",
            f"Teacher {asked.teacher}, student {asked.student}, {asked.size} px, {asked.update} pictures an update;",
            "task, output and block feature terms, gradient clipped, no average. Tensors without numbers are made,",
            "kept and freed as in training, and counted in bytes: networks, gradients, moments, activations. A GPU's",
            "own libraries and fragments come on top; on a CPU the process and the encoders.",
            "",
            f"`--fit {asked.fit}` says: {said[0]}.",
            "",
            f"Its updates hold {counted / 1e3:.2f} GB at most by decant's count and "
            f"{tracked / 1e3:.2f} GB by torch's MemTracker; student and teacher in float32, called on held-out",
            f"pictures before and after, {proof / 1e3:.2f} GB.",
            "",
            f"The ladder, the fastest first; batches of {asked.update}, of 4 and of 1.",
            "",
            "| settings changed | GB |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="sd15")
    parser.add_argument("--student", default="bk-tiny")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--update", type=int, default=64)
    parser.add_argument("--fit", default="6GB")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    text = page(asked)
    print(text)
    if asked.page is not None:
        asked.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
