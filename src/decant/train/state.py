"""The state of a training run: everything an update changes, and how it is saved and taken up again."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn

from decant.errors import refuse
from decant.models.pace import check_compiler, compiled, fast_products
from decant.train import checkpoint
from decant.train.ema import EMA
from decant.train.method import Method, Player
from decant.train.optimizers import LRSchedule, adamw, lr_at

Precision = Literal["no", "fp16", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunSettings:
    """What a run does to its players, whatever the method. It is resumed with exactly the same or not at all.

    steps: updates of the student. lr: the peak, which ``schedule`` and ``warmup`` (in updates) shape. clip:
    the largest gradient norm, None for no clipping. precision: of the forward passes; trained weights stay
    float32. compile: networks run as torch.compile makes them. fast_products: cheaper products on a CPU (see
    ``models.pace``).
    """

    steps: int
    seed: int = 0
    lr: float = 5e-5
    schedule: LRSchedule = "constant"
    warmup: int = 0
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    precision: Precision = "no"
    compile: bool = False
    fast_products: bool = False


class TrainState:
    """Players' weights, optimisers, averages and counts of updates, placed on a device by Accelerate.

    nets: every player's and frozen network, prepared, by name: what the method may call. parameters: player
    -> name -> trained parameter. ema: player -> its average, for players that have one. updates: player ->
    updates made.
    """

    def __init__(self, method: Method, run: RunSettings, accelerator: Accelerator, settings: dict[str, Any]) -> None:
        """Use ``start``."""
        self.run, self.accelerator, self.settings = run, accelerator, settings
        self.players: dict[str, Player] = dict(method.players)
        self.parameters = {name: _parameters(player) for name, player in self.players.items()}
        self._assert_separate()
        self.nets = _place(method, accelerator, _DTYPES[run.precision])
        if run.compile:
            check_compiler(accelerator.device)
            self.nets = {name: compiled(net) for name, net in self.nets.items()}
        self.optimizers = {name: self._optimizer(trained) for name, trained in self.parameters.items()}
        self.ema = {
            name: EMA(self.parameters[name], player.ema)
            for name, player in self.players.items()
            if player.ema is not None
        }
        self.updates = dict.fromkeys(self.players, 0)
        self._focused: str | None = None
        for player in self.players.values():
            player.module.train()

    @classmethod
    def start(
        cls,
        method: Method,
        run: RunSettings,
        *,
        device: Device = "auto",
        extra: Mapping[str, Any] | None = None,
        trackers: Sequence[Any] = (),
        folder: Path | None = None,
    ) -> "TrainState":
        """A fresh run of ``method``: its networks are placed, cast and switched from here on by the trainer.

        extra: whatever else must be the same for a resume (the data's fingerprint, the parents'), as JSON.
        trackers: what Accelerate's ``log_with`` takes, writing into ``folder``. Raises UserError where the
        device is not there.
        """
        accelerator = _accelerator(run.precision, device, trackers, folder)
        settings: dict[str, Any] = {
            "run": asdict(run),
            "method": {"name": type(method).__name__, **_plain(method)},
            "ema": {name: player.ema for name, player in method.players.items()},
            "ranks": accelerator.num_processes,
            "extra": dict(extra or {}),
        }
        settings = json.loads(json.dumps(settings))  # as a checkpoint will give it back
        if trackers:
            accelerator.init_trackers("decant", config={k: str(v) for k, v in _flat(settings).items()})
        return cls(method, run, accelerator, settings)

    @property
    def step(self) -> int:
        """Updates made so far by all players together."""
        return sum(self.updates.values())

    def products(self) -> AbstractContextManager[None]:
        """What forward and backward passes run in."""
        fast = self.run.fast_products and self.accelerator.device.type == "cpu"
        return fast_products() if fast else nullcontext()

    def focus(self, player: str) -> None:
        """Begin ``player``'s turn: only its parameters require gradients, and it has none yet."""
        if player != self._focused:
            for each in self.players.values():
                each.module.requires_grad_(False)
            for parameter in self.parameters[player].values():
                parameter.requires_grad_(True)
            self._focused = player
        for each in self.players.values():
            if not each.module.training:
                each.module.train()
        self.optimizers[player].zero_grad(set_to_none=True)

    def shrink(self, player: str, factor: Tensor) -> None:
        """Divide ``player``'s gradients by ``factor`` in the coming update.

        A fused optimiser divides as it reads them, by what GradScaler calls ``grad_scale``: a pass less over all of
        them. With fp16 that name is the scaler's own.
        """
        if self.accelerator.scaler is None:
            self.optimizers[player].optimizer.grad_scale = factor
        else:
            torch._foreach_div_([p.grad for p in self.parameters[player].values() if p.grad is not None], factor)

    def advance(self, player: str) -> float:
        """Apply ``player``'s gradients: optimiser, average, count. Gives the learning rate of this update."""
        run, updates = self.run, self.updates[player]
        lr = run.lr * lr_at(run.schedule, updates, run.steps, run.warmup)
        for group in self.optimizers[player].param_groups:
            group["lr"] = lr
        optimizer = self.optimizers[player]
        # Accelerate's wrapper looks for installed packages at every step; without a scaler it adds nothing.
        (optimizer if self.accelerator.scaler is not None else optimizer.optimizer).step()
        optimizer.optimizer.grad_scale = None
        if player in self.ema:
            self.ema[player].update(self.parameters[player], updates)
        self.updates[player] += 1
        return lr

    def save(self, work: Path, keep: int = 2) -> None:
        """Write a checkpoint into ``work`` (``RUN/.work``), where the newest ``keep`` stay.

        Call it between updates, from every rank. Raises UserError where the disk refuses.
        """
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            scalars = {
                "settings": self.settings,
                "updates": self.updates,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            tensors = {"weights": self._weights(), "ema": self._averages(), "optimizer": self._moments()}
            checkpoint.write(work, self.step, tensors, scalars, keep)
        self.accelerator.wait_for_everyone()

    def resume(self, work: Path) -> bool:
        """Take up the newest whole checkpoint in ``work``; False if there is none.

        Raises UserError, with nothing changed, where it was made with other settings or for other networks.
        """
        found = checkpoint.latest(work)
        if found is None:
            return False
        self._refuse_other_settings(found)
        weights, averages, moments = (found.tensors(group) for group in ("weights", "ema", "optimizer"))
        _refuse_other_tensors(found.folder, self._weights(), weights)
        _refuse_other_tensors(found.folder, self._averages(), averages)
        self._load_moments(moments)
        with torch.no_grad():
            for own, saved in ((self._weights(), weights), (self._averages(), averages)):
                for name, tensor in own.items():
                    tensor.copy_(saved[name])
        self.updates = {name: found.scalars["updates"][name] for name in self.players}
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.scalars["scaler"])
        return True

    def _assert_separate(self) -> None:
        trained = [id(p) for named in self.parameters.values() for p in named.values()]
        assert len(trained) == len(set(trained)), "a parameter is trained by one player only"

    def _optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Any:
        run = self.run
        return self.accelerator.prepare(adamw(parameters.values(), run.lr, run.weight_decay, run.betas))

    def _weights(self) -> dict[str, Tensor]:
        """What training changes in the networks: trained parameters, and buffers that a state dict holds."""
        weights: dict[str, Tensor] = {}
        for name, player in self.players.items():
            weights |= {f"{name}/{key}": p.data for key, p in self.parameters[name].items()}
            if all(player.module is not other.module for other in self._before(name)):
                kept = player.module.state_dict(keep_vars=True)
                weights |= {f"{name}/{k}": b for k, b in player.module.named_buffers() if k in kept}
        return weights

    def _before(self, name: str) -> list[Player]:
        names = list(self.players)
        return [self.players[each] for each in names[: names.index(name)]]

    def _averages(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": t for name, ema in self.ema.items() for key, t in ema.weights.items()}

    def _moments(self) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}
        for name, named in self.parameters.items():
            state = self.optimizers[name].state
            for key, parameter in named.items():
                moments |= {f"{name}/{key}/{kind}": t for kind, t in state.get(parameter, {}).items()}
        return moments

    def _load_moments(self, moments: Mapping[str, Tensor]) -> None:
        for name, named in self.parameters.items():
            document = self.optimizers[name].state_dict()
            document["state"] = {}
            for index, key in enumerate(named):
                prefix = f"{name}/{key}/"
                mine = {k.removeprefix(prefix): t for k, t in moments.items() if k.startswith(prefix)}
                if mine:
                    document["state"][index] = mine
            self.optimizers[name].load_state_dict(document)

    def _refuse_other_settings(self, found: checkpoint.Checkpoint) -> None:
        own, saved = _flat(self.settings), _flat(found.scalars["settings"])
        for key in sorted(own.keys() | saved.keys()):
            if own.get(key) != saved.get(key):
                raise refuse(
                    f"resume of {found.folder}: {key}",
                    own.get(key),
                    allowed=f"{saved.get(key)}, as the run began",
                    hint="resume with the settings it began with, or start another run in its own folder",
                )


def _accelerator(precision: Precision, device: Device, trackers: Sequence[Any], folder: Path | None) -> Accelerator:
    if is_initialized():
        before = AcceleratorState()
        moved = (before.device.type == "cpu") != (device == "cpu") and torch.accelerator.is_available()
        if before.num_processes == 1 and (before.mixed_precision != precision or moved):
            # Accelerate holds one state a process and refuses another precision; a recipe's stages may
            # differ.
            AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision=precision, log_with=list(trackers) or None, project_dir=folder
    )
    here = accelerator.device.type
    if device not in ("auto", here):
        raise refuse("device", device, allowed=f"auto, cpu or {here}", hint="this machine has no such device")
    if precision == "fp16" and here != "cuda":
        raise refuse("precision", precision, allowed=f"no or bf16 on {here}", hint="fp16 trains on CUDA alone")
    return accelerator


def _parameters(player: Player) -> dict[str, nn.Parameter]:
    named = dict(player.module.named_parameters())
    assert player.parameters and player.parameters <= named.keys(), "a player trains parameters of its module"
    return {name: parameter for name, parameter in named.items() if name in player.parameters}


def _place(method: Method, accelerator: Accelerator, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Every network of the method on its device: frozen ones cast and switched off, others prepared."""
    players = method.players
    assert not players.keys() & method.frozen.keys(), "a network is trained or frozen, not both"
    nets: dict[str, nn.Module] = {}
    for name, net in method.frozen.items():
        nets[name] = net.requires_grad_(False).eval().to(device=accelerator.device, dtype=dtype)
    prepared: dict[int, nn.Module] = {}
    for name, player in players.items():
        key = id(player.module)
        if key not in prepared:
            sharing = [other for other in players.values() if other.module is player.module]
            trained = frozenset[str]().union(*(other.parameters for other in sharing))
            prepared[key] = _prepare(player.module, trained, accelerator, dtype)
        nets[name] = prepared[key]
    return nets


def _prepare(module: nn.Module, trained: frozenset[str], accelerator: Accelerator, dtype: torch.dtype) -> nn.Module:
    for name, parameter in module.named_parameters():
        # Small updates vanish in half precision; what is only passed through may be half.
        parameter.data = parameter.data.to(accelerator.device, torch.float32 if name in trained else dtype)
        parameter.requires_grad_(name in trained)
    forward = vars(module).get("forward")
    prepared = accelerator.prepare(module)
    # Accelerate puts an autocasting forward on the module and leaves it there after training. The loop
    # autocasts.
    for patched in ("forward", "_original_forward"):
        vars(module).pop(patched, None)
    if forward is not None:
        vars(module)["forward"] = forward
    return prepared


def _plain(thing: object) -> dict[str, Any]:
    """The numbers, words and tables of them among a dataclass's fields, nested too: what JSON can hold."""
    found: dict[str, Any] = {}
    for field in fields(thing) if is_dataclass(thing) else ():
        value = getattr(thing, field.name)
        if is_dataclass(value):
            found[field.name] = _plain(value)
        elif _is_plain(value) or (isinstance(value, Mapping) and all(map(_is_plain, value.values()))):
            found[field.name] = dict(value) if isinstance(value, Mapping) else value
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _refuse_other_tensors(folder: Path, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name in sorted(own.keys() | saved.keys()):
        mine = tuple(own[name].shape) if name in own else "absent"
        theirs = tuple(saved[name].shape) if name in saved else "absent"
        if mine != theirs:
            raise refuse(
                f"resume of {folder}: shape of {name}",
                mine,
                allowed=f"{theirs}, as the run began",
                hint="resume with the networks it began with, or start another run in its own folder",
            )
