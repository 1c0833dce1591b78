"""Seeds that are a function of their parts: the root of every random number in decant."""

from hashlib import blake2b

import torch


def seed_of(*parts: int | str) -> int:
    """A 64-bit seed from any parts, equal on every machine and in every process (unlike ``hash``)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own, seeded by ``seed_of(*parts)``."""
    return torch.Generator("cpu").manual_seed(seed_of(*parts))
