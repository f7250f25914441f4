"""Tiny random models in the shape of files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sinkjax.caches import FullCache
from sinkjax.models import Decoder
from sinkjax.models.families import FAMILIES, config_from_hf

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


@pytest.fixture
def hf_tensors():
    """config.json values → random tensors under their Hugging Face names."""

    def make(values: dict) -> dict[str, np.ndarray]:
        config = config_from_hf(values)
        random = np.random.default_rng(0)
        table = {weight.path: weight.hf for weight in FAMILIES[config.family].weights}
        tensors = {}
        for name, leaf in Decoder.shapes(config).items():
            layer = name.split(".")[1] if name.startswith("blocks.") else None
            source = table[name if layer is None else name.replace(layer, "{}", 1)]
            shape = source.make(config, np.zeros(leaf.shape)).shape  # transposed, or not
            tensors[source.names[0].format(layer)] = random.normal(size=shape, scale=0.2).astype(
                np.float32
            )
        return tensors

    return make


@pytest.fixture
def hf_folder(tmp_path, hf_tensors):
    """Writes a Hugging Face folder, and returns it; keyword arguments change its config.json."""

    def make(name: str = "tiny", *, tensors=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        values = TINY | changes
        (folder / "config.json").write_text(json.dumps(values))
        save_file(hf_tensors(values) if tensors is None else tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def tiny():
    return dict(TINY)


@pytest.fixture
def logits():
    """The logits of a model for tokens `[B, T]`, by default some."""

    def run(model: Decoder, tokens=None) -> np.ndarray:
        if tokens is None:
            tokens = np.arange(40).reshape(2, 20) % model.config.vocab_size
        caches = model.init_caches(FullCache(tokens.shape[1]), batch=tokens.shape[0])
        hidden, _ = model(jnp.asarray(tokens), caches)
        return np.asarray(model.logits(hidden))

    return run


@pytest.fixture
def tokenizer():
    import tokenizers

    from sinkjax.text.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({chr(97 + i): i for i in range(26)} | {"<end>": 26}, [])
    )
    backend.add_special_tokens(["<end>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=[26])
