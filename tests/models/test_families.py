"""Every family against the logits that transformers gave for the same weights."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.caches import FullCache
from sinkjax.checkpoints import open_checkpoint
from sinkjax.models import RopeScaling, families
from sinkjax.models.families import config_from_hf

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = sorted(folder.name for folder in DATA.iterdir())


def error_of(name: str) -> float:
    """The greatest difference to the reference, over the greatest logit."""
    reference = np.load(DATA / name / "reference.npz")
    tokens, expected = reference["tokens"], reference["logits"]
    model = open_checkpoint(str(DATA / name)).model
    caches = model.init_caches(FullCache(tokens.shape[1]), batch=len(tokens))
    hidden, _ = model(jnp.asarray(tokens), caches)
    return float(np.abs(model.logits(hidden) - expected).max() / np.abs(expected).max())


def test_all_families_have_a_reference():
    kinds = {json.loads((DATA / n / "config.json").read_text())["model_type"] for n in NAMES}
    assert kinds == set(families.FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    assert error_of(name) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_spelling_of_transformers_4(name):
    old, new = (
        config_from_hf(json.loads((DATA / name / file).read_text()))
        for file in ("config.hub.json", "config.json")
    )
    assert old == new


def _rows_permuted(weight, x, config, *, permuted):
    x = families.common.unpermute(x, config.heads) if weight.path.endswith("attention.q") else x
    return x.T if weight.matrix else x


def _out_not_transposed(weight, x, config, *, permuted):
    return x.T if weight.matrix and not weight.path.endswith("attention.out") else x


def _gate_and_up_swapped(weight, x, config, *, permuted):
    return x.T[:, ::-1] if weight.path.endswith("mlp.gate") else x.T if weight.matrix else x


@pytest.mark.parametrize("wrong", [_rows_permuted, _out_not_transposed, _gate_and_up_swapped])
@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_the_comparison_notices(monkeypatch, name, wrong):
    monkeypatch.setattr(families.common.Weight, "arrange", wrong)
    try:
        assert error_of(name) > 1e-2
    except ValueError as error:  # where the matrix is not square
        assert "misshapen" in str(error)


@pytest.mark.parametrize("name", ["llama31", "llama_linear", "llama_yarn"])
def test_the_comparison_notices_a_scaling_that_is_ignored(monkeypatch, name):
    monkeypatch.setattr(families.common, "_scaling_from_hf", lambda *_: None)
    assert error_of(name) > 1e-3


BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def test_defaults():
    config = config_from_hf(BASE)
    assert (config.kv_heads, config.head_dim, config.rope_base) == (4, 16, 10_000.0)
    assert config.norm_eps == 1e-6 and config.rope_scaling is None
    assert not (config.tied_embeddings or config.qkv_bias or config.out_bias or config.qk_norm)
    nulls = BASE | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}
    assert config_from_hf(nulls) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0, 4096)),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            RopeScaling("llama3", 8.0, 512),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
            | {"attention_factor": 1.5, "beta_fast": 16, "truncate": False},
            RopeScaling("yarn", 4.0, 1024, beta_fast=16, attention_factor=1.5, truncate=False),
        ),
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 4096)),
        ({"rope_type": "default"}, None),
    ],
)
def test_rope_in_both_spellings(values, expected):
    old = config_from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": values})
    new = config_from_hf(BASE | {"rope_parameters": values | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_base == 5e5 and old.rope_scaling == expected


def test_biases():
    config = config_from_hf(BASE | {"attention_bias": True})
    assert config.qkv_bias and config.out_bias
    config = config_from_hf(BASE | {"model_type": "qwen2"})
    assert config.qkv_bias and not config.out_bias


def test_qwen3():
    config = config_from_hf(BASE | {"model_type": "qwen3"})
    assert config.qk_norm and config.head_dim == 128


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 512}, 512),
        ({"model_type": "qwen2", "sliding_window": 512}, None),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, None),
        (
            {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True}
            | {"max_window_layers": 0},
            512,
        ),
        (
            {"model_type": "qwen3", "sliding_window": 512, "use_sliding_window": True}
            | {"max_window_layers": 4},
            None,
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 4}, None),
        ({"model_type": "llama", "sliding_window": 512}, None),
    ],
)
def test_sliding_window(values, window):
    assert config_from_hf(BASE | values).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: expected one of llama"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: expected 'silu'"),
        ({"mlp_bias": True}, "mlp_bias True is not supported: expected False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised with 'awq'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size must be one whole number.*got '64'"),
        ({"num_attention_heads": 0}, "heads must be ≥ 1"),
        ({"num_key_value_heads": 3}, "4 heads do not divide over 3 KV heads"),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
            | {"max_window_layers": 2},
            "2 of 4 layers with a sliding window",
        ),
    ],
)
def test_unsupported(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(BASE | changes)


def test_every_row_of_every_table_is_its_own():
    for family in families.FAMILIES.values():
        for column in ("path", "hf", "gguf"):
            names = [getattr(weight, column) for weight in family.weights]
            assert len(set(names)) == len(names)
            assert all(re.fullmatch(r"[a-z0-9_.{}]+", name) for name in names)
