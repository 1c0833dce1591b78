"""Digests of what computes: equal digests give equal numbers, wherever the weights came from."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_NOT_ABOUT_NUMBERS = ("dtype", "torch_dtype", "transformers_version", "architectures")


def module_digest(module: Any) -> str:
    """SHA-256 of a diffusers or transformers network: its class, config, and every weight's name, dtype and bytes."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    said = {key: value for key, value in config.items() if key[0] != "_" and key not in _NOT_ABOUT_NUMBERS}
    digest = hashlib.sha256(json.dumps([type(module).__name__, said], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer: its whole pipeline of rules and words, and its longest text."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are the state that the last call left.
    said = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([said, special, tokenizer.model_max_length], sort_keys=True).encode()).hexdigest()
