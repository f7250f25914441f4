import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from sinkjax.checkpoints.builtin import fetch_model
from sinkjax.checkpoints.gguf import GGUFFile
from sinkjax.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "data" / "tokenizer_reference.json"


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """What scripts/make_tokenizer_reference.py wrote."""
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def smollm2_gguf_metadata() -> dict[str, Any]:
    """The tokenizer's part of the GGUF file of SmolLM2-135M-Instruct."""
    metadata = GGUFFile(fetch_model("smollm2-135m-instruct")).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_gguf_metadata)


@pytest.fixture(scope="session")
def byte_level_metadata() -> dict[str, Any]:
    """A byte-level vocabulary: each byte, a few merges, and three added tokens."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "ð Ł", "ðŁ \u0133"]
    tokens = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    added = ["<|im_start|>", "<|im_end|>", "«tool»"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + added,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


@pytest.fixture(scope="session")
def byte_level(byte_level_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata)


@pytest.fixture(scope="session")
def sentencepiece(reference: dict[str, Any]) -> Tokenizer:
    """A small model that the sentencepiece library trained."""
    return Tokenizer.from_gguf(reference["sentencepiece"]["metadata"])


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Either kind."""
    return request.getfixturevalue(request.param)
