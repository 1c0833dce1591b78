"""The state of a training run: everything an update changes, and how it is saved and taken up again."""

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn

from decant.errors import refuse
from decant.maths.seeds import seed_of
from decant.models.pace import InDtype, check_compiler, compiled, fast_products
from decant.ranks import here
from decant.train import checkpoint
from decant.train.ema import EMA
from decant.train.method import Method, Player, average_of
from decant.train.norm import norm_of
from decant.train.one_by_one import OneByOne
from decant.train.optimizers import LRSchedule, Optimizer, adamw, adamw8bit, lr_at

Precision = Literal["no", "fp16", "bf16"]
Weights = Literal["float32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
# A player rests while another learns: some parameters then get no gradient. And so the buckets of gradients stay as
# they are: made anew after the first step, they would make a resumed run's sums differ in their last digits. Gradients
# lie in the buckets: apart, they would be held twice.
_DDP = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunSettings:
    """What a run does to its players, whatever the method. It is resumed with exactly the same or not at all.

    steps: updates of the student. lr: the peak, which ``schedule`` and ``warmup`` (in updates) shape. clip:
    the largest gradient norm, None for no clipping. precision: of the forward passes. compile: networks run as
    torch.compile makes them. fast_products: cheaper products on a CPU (see ``models.pace``).

    For memory: optimizer: adamw8bit keeps its moments in 8 bits. in_backward: each parameter is updated as soon as its
    gradient is there, which is then freed. weights: of what is trained; bfloat16 is rounded stochastically.
    teacher_precision: of frozen networks, None for that of the forward passes. channels_last: the order of numbers that
    convolutions like.
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
    optimizer: Optimizer = "adamw"
    in_backward: bool = False
    weights: Weights = "float32"
    teacher_precision: Precision | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be had together."""
        if self.weights == "bf16" and self.precision != "bf16":
            value = f"bf16 with precision {self.precision}"
            raise refuse("weights", value, allowed="bf16 with precision bf16", hint="set precision=bf16 too")
        if self.lean and self.precision == "fp16":
            allowed = "bf16 or no where parameters are updated one by one"
            raise refuse("precision", "fp16", allowed=allowed, hint="set precision=bf16")
        if self.in_backward and self.clip is not None:
            hint = "set clip=null, or optimizer_in_backward=false"
            allowed = "null: the norm of all gradients is known only when the last of them has been applied"
            raise refuse("clip", self.clip, allowed=allowed, hint=hint)

    @property
    def lean(self) -> bool:
        """Whether parameters are updated one by one: slower than all at once, and with less memory."""
        return self.in_backward or self.optimizer != "adamw" or self.weights != "float32"


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
        if run.in_backward and accelerator.num_processes > 1:
            hint = "set optimizer_in_backward=false, or start one process"
            value = f"with {accelerator.num_processes} ranks"
            raise refuse("optimizer_in_backward", value, allowed="one rank: others' gradients come later", hint=hint)
        self.nets = _place(method, accelerator, run)
        if run.compile:
            check_compiler(accelerator.device)
            self.nets = {name: compiled(net) for name, net in self.nets.items()}
        self.lean: dict[str, OneByOne] = {}
        self.optimizers: dict[str, Any] = {}
        for name, trained in self.parameters.items():
            if run.lean:
                self.lean[name] = self._one_by_one(name, trained)
            else:
                self.optimizers[name] = accelerator.prepare(adamw(trained.values(), *_shape(run)))
        self.ema = {
            name: EMA(self.parameters[name], player.ema)
            for name, player in self.players.items()
            if player.ema is not None
        }
        self.nets |= {average_of(name): self._average(name) for name, each in self.players.items() if each.run_average}
        self.updates = dict.fromkeys(self.players, 0)
        self._focused: str | None = None
        self._shrink: Tensor | None = None
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
        if player in self.lean:
            self.lean[player].begin(self._lr(player), self.updates[player])
        else:
            self.optimizers[player].zero_grad(set_to_none=True)

    def norm(self, player: str) -> Tensor:
        """The norm of all of ``player``'s gradients."""
        if player in self.lean:
            return self.lean[player].norm()
        return norm_of([p.grad for p in self.parameters[player].values() if p.grad is not None])

    def shrink(self, player: str, factor: Tensor) -> None:
        """Divide ``player``'s gradients by ``factor`` in the coming update.

        A fused optimiser divides as it reads them, by what GradScaler calls ``grad_scale``: a pass less over all of
        them. With fp16 that name is the scaler's own.
        """
        if player in self.lean:
            self._shrink = factor
        elif self.accelerator.scaler is None:
            self.optimizers[player].optimizer.grad_scale = factor
        else:
            torch._foreach_div_([p.grad for p in self.parameters[player].values() if p.grad is not None], factor)

    def advance(self, player: str) -> float:
        """Apply ``player``'s gradients: optimiser, average, count. Gives the learning rate of this update."""
        updates, lr = self.updates[player], self._lr(player)
        if player in self.lean:
            self.lean[player].step(self._shrink)
            self._shrink = None
        else:
            optimizer = self.optimizers[player]
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Accelerate's wrapper looks for installed packages at every step; without a scaler it adds nothing.
            (optimizer if self.accelerator.scaler is not None else optimizer.optimizer).step()
            optimizer.optimizer.grad_scale = None
        if player in self.ema:
            self.ema[player].update(self.parameters[player], updates)
        self.updates[player] += 1
        return lr

    def _average(self, player: str) -> nn.Module:
        """A network whose trained parameters are those of ``player``'s average, and so follow it."""
        module = self.players[player].module
        twin = copy.deepcopy(module).requires_grad_(False).eval()
        for name, parameter in twin.named_parameters():
            own = self.ema[player].weights.get(name)
            parameter.data = module.get_parameter(name).data if own is None else own
        return compiled(twin) if self.run.compile else twin

    def _lr(self, player: str) -> float:
        """The learning rate of ``player``'s coming update."""
        run, who = self.run, self.players[player]
        pace = lr_at(run.schedule, self.updates[player] // who.updates_each, run.steps, run.warmup)
        return run.lr * who.lr_scale * pace

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

    def _one_by_one(self, player: str, parameters: Mapping[str, nn.Parameter]) -> OneByOne:
        make = adamw8bit if self.run.optimizer == "adamw8bit" else adamw
        shape, seed = _shape(self.run), seed_of(self.run.seed, player)
        return OneByOne(parameters, lambda each: make(each, *shape), seed, self.run.in_backward)

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
            if name in self.lean:
                moments |= {f"{name}/{key}": t for key, t in self.lean[name].moments().items()}
                continue
            state = self.optimizers[name].state
            for key, parameter in named.items():
                moments |= {f"{name}/{key}/{kind}": t for kind, t in state.get(parameter, {}).items()}
        return moments

    def _load_moments(self, moments: Mapping[str, Tensor]) -> None:
        for name, named in self.parameters.items():
            if name in self.lean:
                own = f"{name}/"
                self.lean[name].load({k.removeprefix(own): t for k, t in moments.items() if k.startswith(own)})
                continue
            document = self.optimizers[name].state_dict()
            document["state"] = {}
            for index, (key, parameter) in enumerate(named.items()):
                prefix = f"{name}/{key}/"
                saved = {k.removeprefix(prefix): t for k, t in moments.items() if k.startswith(prefix)}
                mine = {kind: _laid_out_as(parameter, t) for kind, t in saved.items()}
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
    ranks = here()
    ranks.join()
    if is_initialized():
        before = AcceleratorState()
        moved = (before.device.type == "cpu") != (device == "cpu") and torch.accelerator.is_available()
        if before.mixed_precision != precision or (ranks.count == 1 and moved):
            # Accelerate holds one state a process and refuses another precision; a recipe's stages may
            # differ.
            AcceleratorState._reset_state(reset_partial_state=ranks.count == 1)
    accelerator = Accelerator(
        cpu=device == "cpu" and ranks.count == 1,
        mixed_precision=precision,
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[_DDP],
    )
    there = accelerator.device.type
    if device not in ("auto", there):
        raise refuse("device", device, allowed=f"auto, cpu or {there}", hint="this machine has no such device")
    if precision == "fp16" and there != "cuda":
        raise refuse("precision", precision, allowed=f"no or bf16 on {there}", hint="fp16 trains on CUDA alone")
    return accelerator


def _parameters(player: Player) -> dict[str, nn.Parameter]:
    named = dict(player.module.named_parameters())
    assert player.parameters and player.parameters <= named.keys(), "a player trains parameters of its module"
    return {name: parameter for name, parameter in named.items() if name in player.parameters}


def _shape(run: RunSettings) -> tuple[float, float, tuple[float, float]]:
    return run.lr, run.weight_decay, run.betas


def _place(method: Method, accelerator: Accelerator, run: RunSettings) -> dict[str, nn.Module]:
    """Every network of the method on its device: frozen ones cast and switched off, others prepared."""
    dtype, frozen_dtype = DTYPES[run.precision], DTYPES[run.teacher_precision or run.precision]
    players = method.players
    assert not players.keys() & method.frozen.keys(), "a network is trained or frozen, not both"
    nets: dict[str, nn.Module] = {}
    for name, net in method.frozen.items():
        for tensor in (*net.requires_grad_(False).eval().parameters(), *net.buffers()):
            tensor.data = _moved(tensor, accelerator.device, frozen_dtype, run.channels_last)
        nets[name] = net if frozen_dtype in (dtype, torch.float32) else InDtype(net, frozen_dtype)
    prepared: dict[int, nn.Module] = {}
    for name, player in players.items():
        key = id(player.module)
        if key not in prepared:
            sharing = [other for other in players.values() if other.module is player.module]
            trained = frozenset[str]().union(*(other.parameters for other in sharing))
            prepared[key] = _prepare(player.module, trained, accelerator, run)
        nets[name] = prepared[key]
    return nets


def _prepare(module: nn.Module, trained: frozenset[str], accelerator: Accelerator, run: RunSettings) -> nn.Module:
    for name, parameter in module.named_parameters():
        # Small updates vanish in half precision, unless they are rounded stochastically; what is only passed through
        # may be half.
        dtype = torch.float32 if name in trained and run.weights == "float32" else DTYPES[run.precision]
        parameter.data = _moved(parameter, accelerator.device, dtype, run.channels_last)
        parameter.requires_grad_(name in trained)
    forward = vars(module).get("forward")
    prepared = accelerator.prepare(module, device_placement=[False])  # it is placed
    # Accelerate puts an autocasting forward on the module and leaves it there after training. The loop
    # autocasts.
    for patched in ("forward", "_original_forward"):
        vars(module).pop(patched, None)
    if forward is not None:
        vars(module)["forward"] = forward
    return prepared


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A parameter's numbers on a device; those of convolutions with their channels innermost if asked for."""
    moved = tensor.data.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    return moved.contiguous(memory_format=torch.channels_last) if channels_last and moved.ndim == 4 else moved


def _laid_out_as(parameter: Tensor, moment: Tensor) -> Tensor:
    """A moment in its parameter's order of memory: a fused update reads both number by number as they lie there."""
    if moment.shape != parameter.shape:
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


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
