"""Settings every test shares, and a whole pipeline of SDXL, small enough to be made anew in every test."""

import hashlib
import http.server
import os
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

settings.register_profile("decant", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("decant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last file of a run must not be one that keeps a single process busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _sdxl(prediction_type: str = "epsilon", *, zeros: bool = True, **unet: Any) -> Any:
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizers = [CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, **pad) for pad in ({}, {"pad_token": "!"})]

    def text(hidden: int, layers: int, act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            hidden_act=act,
            projection_dim=24,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
        )

    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**{**config, **unet}).eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text(32, 2, "quick_gelu")).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text(48, 3, "gelu")).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


@pytest.fixture
def make_sdxl() -> Callable[..., Any]:
    """`make_sdxl(prediction_type, zeros=True, **unet_settings)`: seeded, on the CPU, 64 px pictures."""
    return _sdxl


@pytest.fixture(scope="session")
def sdxl_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL as plain diffusers saves it, for all tests: to be read, and never changed."""
    where = tmp_path_factory.mktemp("sdxl") / "teacher"
    _sdxl().save_pretrained(where)
    return where


@pytest.fixture
def sdxl_folder(tmp_path: Path, sdxl_saved: Path) -> Path:
    """The same, a copy of one's own, to be broken at will."""
    return shutil.copytree(sdxl_saved, tmp_path / "teacher")


@contextmanager
def _served(folder: Path, **habits: Any) -> Iterator[tuple[str, list[str]]]:
    """A web server over a folder, and the ranges that it was asked for.

    habits: ranges, whether it has them; breaks, bytes after which a connection ends (the first so many times); fails,
    status codes that are given first, with retry_after, the seconds that it then asks to wait.
    """
    asked: list[str] = []
    breaks, fails = list(habits.get("breaks", ())), list(habits.get("fails", ()))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Range"])
            file = folder / self.path.lstrip("/")
            if fails:
                self.send_response(fails.pop(0))
                if "retry_after" in habits:
                    self.send_header("Retry-After", str(habits["retry_after"]))
                return self.end_headers()
            if not file.is_file():
                return self.send_error(404)
            content = file.read_bytes()
            total, begin, end = len(content), 0, len(content)
            ranged = habits.get("ranges", True)
            if ranged:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                begin, end = int(first), int(last or total - 1) + 1
            self.send_response(206 if ranged else 200)
            if ranged:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            body = content[begin:end]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if len(body) > 1 and breaks:
                body = body[: breaks.pop(0)]
            with suppress(OSError):
                self.wfile.write(body)
            return None

        def log_message(self, *args: object) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served() -> Callable[..., AbstractContextManager[tuple[str, list[str]]]]:
    """`_served`: ``with served(folder, ranges=False) as (url, asked)``."""
    return _served
