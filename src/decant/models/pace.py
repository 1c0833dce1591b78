"""How fast to compute: networks compiled into one graph, and cheaper products."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from decant.errors import refuse


@contextmanager
def fast_products() -> Iterator[None]:
    """Attention in plain products, and float32 products of bfloat16 factors where the CPU has them: 1.4 times the pace.

    Sums stay in float32. The fused CPU attention is made for long sequences; 64 positions of 16 channels are not. For
    the CPU alone: other devices have fused attention worth keeping.
    """
    mkldnn: Any = torch.backends.mkldnn  # its stub does not know these two
    backends = (mkldnn.matmul, mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "bf16"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def compiled(net: nn.Module) -> nn.Module:
    """The network as torch.compile makes it, which shares its parameters; tap it before.

    Every shape is compiled by itself: shapes generalised from those seen so far would make a resumed run's graphs, and
    so its last digits, differ from an uninterrupted run's.
    """
    return cast(nn.Module, torch.compile(net, dynamic=False))


class InDtype(nn.Module):
    """A network that computes in a dtype of its own: floats are cast to it on the way in, to float32 on the way out."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` gives, a tensor or nested tuples and dicts of them, in float32."""
        args, kwargs = tree_map(lambda value: _cast(value, self.dtype), (args, kwargs))
        with torch.autocast(next(self.module.parameters()).device.type, enabled=False):
            output = self.module(*args, **kwargs)
        return tree_map(lambda value: _cast(value, torch.float32), output)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile has nothing to compile with."""
    wanted = os.environ.get("CXX", "")
    if device.type == "cpu" and not any(map(shutil.which, (wanted, "g++", "clang++", "c++", "cl"))):
        hint = "install g++ or clang++ (Debian: apt install g++), or set compile=false"
        raise refuse("compile", True, allowed="false without a C++ compiler", hint=hint)
