"""How configurations are read, and that the comparison with transformers notices mistakes."""

import dataclasses
import json

import numpy as np
import pytest

from sinkjax.checkpoints import open_checkpoint
from sinkjax.models import RopeScaling, families
from sinkjax.models.families import config_from_hf
from tests.models.conftest import DATA, NAMES, logits_of, reference


def error_of(name: str) -> float:
    """The greatest difference to the reference, over the greatest logit."""
    tokens, expected = reference(name)
    found = logits_of(open_checkpoint(str(DATA / name)).model, tokens)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_the_spelling_of_transformers_4(name):
    old, new = (
        config_from_hf(json.loads((DATA / name / file).read_text()))
        for file in ("config.hub.json", "config.json")
    )
    assert old == new


def _rows_permuted(config, x):
    return families.common.unpermute(x, config.heads).T


def _not_transposed(config, x):
    return x


def _columns_reversed(config, x):
    return x.T[:, ::-1]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("blocks.{}.attention.q", _rows_permuted),
        ("blocks.{}.attention.out", _not_transposed),
        ("blocks.{}.mlp.gate", _columns_reversed),
    ],
)
@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_the_comparison_notices(monkeypatch, name, path, wrong):
    family = families.FAMILIES[name.rstrip("2") if name == "llama2" else name]
    rows = [
        row._replace(hf=row.hf._replace(make=wrong)) if row.hf and row.path == path else row
        for row in family.weights
    ]
    other = dataclasses.replace(family, weights=tuple(rows))
    monkeypatch.setitem(families.FAMILIES, family.name, other)
    try:
        assert error_of(name) > 1e-2
    except ValueError as error:  # where the matrix is not square
        assert "misshapen" in str(error)


@pytest.mark.parametrize("name", ["llama31", "llama_linear", "llama_yarn"])
def test_the_comparison_notices_a_scaling_that_is_ignored(monkeypatch, name):
    monkeypatch.setattr(families.common, "scaling_from_hf", lambda *_: None)
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
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported: expected one of silu"),
        ({"partial_rotary_factor": 0.05}, "even number of dimensions, 2 to head_dim 16, got 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' needs 8 short_factors > 0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised with 'awq'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size must be one whole number.*got '64'"),
        ({"num_attention_heads": 0}, "heads must be ≥ 1"),
        ({"num_key_value_heads": 3}, "4 heads do not divide over 3 KV heads"),
    ],
)
def test_unsupported(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(BASE | changes)
