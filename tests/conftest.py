"""The models that tests run: tiny random ones, and the built-in one."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported, here and in commands
# The interpreter of GPU kernels blocks a thread of XLA's pool for each warpgroup: with as many
# threads as a small machine has cores, it would wait for ever.
os.environ.setdefault("PJRT_NPROC", "16")

import jax.numpy as jnp
import pytest
import tokenizers
from flax import nnx

from sinkjax.checkpoints import orbax
from sinkjax.models import Config, Decoder
from sinkjax.streaming import LanguageModel
from sinkjax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_decoder(vocab_size: int, *, seed: int = 0, dtype=jnp.float32) -> Decoder:
    """A small Llama with random weights: grouped queries, a head of its own."""
    config = Config(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_base=10_000.0,
        trained_context=64,
    )
    return Decoder(config, rngs=nnx.Rngs(seed), dtype=dtype)


def byte_tokenizer(eos_ids=(257,)) -> Tokenizer:
    """One token a byte, then `<|im_start|>` (256) and `<|im_end|>` (257)."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    )
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=eos_ids, chat_template=CHATML)


def python(*args, stdin: bytes | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Runs Python in a process of its own, where warnings are errors too."""
    command = [sys.executable, "-W", "error", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, input=stdin, capture_output=True, timeout=240
    )


@pytest.fixture(scope="session")
def tiny_lm() -> LanguageModel:
    """97 tokens, no tokenizer."""
    return LanguageModel(tiny_decoder(97), name="tiny")


@pytest.fixture(scope="session")
def byte_lm() -> LanguageModel:
    """Reads and writes bytes, most of them not UTF-8. Ends with `<|im_end|>`."""
    return LanguageModel(tiny_decoder(258), byte_tokenizer(), name="tiny-bytes")


@pytest.fixture(scope="session")
def tiny_folder(byte_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `byte_lm` as a folder, for commands to open."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bytes"
    orbax.save_model(folder, byte_lm.config, byte_lm.model, byte_lm.tokenizer)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct, downloaded on the first use (77 MB)."""
    return LanguageModel.load("smollm2-135m-instruct")
