"""The config.json of the families after Llama 2, as the hub has them, and MXFP4."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from sinkjax.checkpoints import open_checkpoint
from sinkjax.models import Config, RopeScaling
from sinkjax.models.config import Experts
from sinkjax.models.families import (
    config_from_hf,
    gemma2,
    gpt_oss,
    mistral,
    mixtral,
    phi3,
    qwen3_moe,
)
from tests.models.conftest import DATA

MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL = MISTRAL | {
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1e6,
    "sliding_window": None,
}
PHI3 = {
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": list(phi3.PRESETS["phi-3-mini-128k"].rope_scaling.long_factors),
        "short_factor": list(phi3.PRESETS["phi-3-mini-128k"].rope_scaling.short_factors),
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
GEMMA = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_27B = {
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}
GEMMA3 = GEMMA3_27B["text_config"]
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.mark.parametrize(
    ("hf", "preset"),
    [
        (MISTRAL, mistral.PRESETS["mistral-7b"]),
        (MIXTRAL, mixtral.PRESETS["mixtral-8x7b"]),
        (PHI3, phi3.PRESETS["phi-3-mini-128k"]),
        (GEMMA2, gemma2.PRESETS["gemma-2-9b"]),
        (QWEN3_MOE, qwen3_moe.PRESETS["qwen3-30b-a3b"]),
        (GPT_OSS, gpt_oss.PRESETS["gpt-oss-20b"]),
    ],
    ids=lambda x: x.family if isinstance(x, Config) else "",
)
def test_presets_are_what_the_hub_has(hf, preset):
    assert config_from_hf(hf) == preset


def test_gemma():
    config = config_from_hf(GEMMA)
    assert config.activation == "gelu_tanh"  # although it says "gelu"
    assert config.tied_embeddings and config.embedding_scale == 2048**0.5
    exact = config_from_hf(GEMMA2 | {"hidden_activation": "gelu"})
    assert exact.activation == "gelu"  # Gemma 2 means what it says


def test_gemma3_with_what_its_files_leave_out():
    config = config_from_hf(GEMMA3_27B)
    assert config.family == "gemma3" and config.vocab_size == 262_208
    assert [i for i in range(62) if config.window(i) is None] == list(range(5, 62, 6))
    local, everywhere = config.rotary(0), config.rotary(5)
    assert (local.base, local.scaling) == (1e4, None)
    assert everywhere.base == 1e6 and everywhere.scaling.factor == 8
    assert config.attention_scale == 168**-0.5 and config.logit_soft_cap is None
    assert config.tied_embeddings and config.trained_context == 131_072
    listed = GEMMA3 | {"layer_types": ["full_attention"] + ["sliding_attention"] * 61}
    assert config_from_hf(listed).local_layers == (False,) + (True,) * 61


@pytest.mark.parametrize("spelling", ["language_model.", "model.language_model."])
def test_gemma3_that_sees(tmp_path, spelling):
    """The same model inside a multimodal one, as the hub and as transformers 5 names it."""
    hf = json.loads((DATA / "gemma3" / "config.json").read_text())
    wrapped = {"model_type": "gemma3", "text_config": hf, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    tensors = {"vision_tower.x.weight": jnp.ones(3), "multi_modal_projector.y": jnp.ones(3)}
    front = "model." if spelling.startswith("model.") else ""
    for name, x in load_file(DATA / "gemma3" / "model.safetensors").items():
        tensors[spelling + (name.removeprefix("model.") if front else name)] = x
    save_file(tensors, tmp_path / "model.safetensors")
    expected = open_checkpoint(str(DATA / "gemma3")).model
    found = open_checkpoint(str(tmp_path)).model
    assert dataclasses.replace(found.config, family="gemma3_text") == expected.config
    weights = expected.weights()
    assert found.weights().keys() == weights.keys()
    for name, x in found.weights().items():
        np.testing.assert_array_equal(x, weights[name], err_msg=name)


def test_phi3():
    named_so = PHI3["rope_scaling"] | {"type": "yarn"}  # by some of the first files
    assert config_from_hf(PHI3 | {"rope_scaling": named_so}) == config_from_hf(PHI3)
    part = PHI3 | {"rope_scaling": None, "partial_rotary_factor": 0.75, "sliding_window": None}
    config = config_from_hf(part)
    assert config.rotary_dim == 72 and config.rope_scaling is None and config.window(0) is None


def test_experts():
    def layers(**changes) -> Experts | None:
        return config_from_hf(QWEN3_MOE | {"num_hidden_layers": 4} | changes).experts

    assert layers().layers is None and layers().normalise
    assert layers(decoder_sparse_step=2).layers == (False, True, False, True)
    assert layers(mlp_only_layers=[3]).layers == (True, True, True, False)
    assert layers(mlp_only_layers=[0, 1, 2, 3]) is None
    del (renamed := dict(QWEN3_MOE))["num_experts"], renamed["norm_topk_prob"]
    experts = config_from_hf(renamed | {"num_local_experts": 16}).experts
    assert experts == Experts(16, 8, 768, normalise=False)


def test_gpt_oss_alternates_by_itself():
    assert config_from_hf(GPT_OSS | {"layer_types": None}) == config_from_hf(GPT_OSS)


@pytest.mark.parametrize(
    ("hf", "changes", "message"),
    [
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        (PHI3, {"rope_scaling": {"type": "longrope"}}, "needs 48 short_factors > 0"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be .* > 0, got 0"),
        (GEMMA2, {"attn_logit_softcapping": "50"}, "attn_logit_softcapping must be .* got '50'"),
        (
            GEMMA2,
            {"layer_types": ["full_attention"]},
            "each of 42 layers, got full_attention for 1",
        ),
        (GEMMA2, {"layer_types": ["chunked_attention"] * 42}, "got chunked_attention for 42"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 1e6}}, "with rope_theta are not supported"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type 'linear' of the layers with a sliding window",
        ),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern must be ≥ 1, got 0"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "9 of 8 experts"),
        (QWEN3_MOE, {"mlp_only_layers": [48]}, r"mlp_only_layers \[48\]: expected .* 0 to 47"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        (QWEN3_MOE, {"num_experts": None}, "no 'num_experts'"),
        (GPT_OSS, {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0 is not supported: expected 1.702"),
        (GPT_OSS, {"swiglu_limit": 0}, "swiglu_limit must be a number > 0, got 0"),
        (GPT_OSS, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: expected 'silu'"),
        (GPT_OSS, {"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        (MIXTRAL, {"quantization_config": {"quant_method": "mxfp4"}}, "quantised with 'mxfp4'"),
    ],
)
def test_unsupported(hf, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf | changes)


def test_mxfp4_is_exact():
    """Every byte under every scale, against float64; what is finite is exact in bfloat16."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    found = gpt_oss.dequantised(blocks, scales)
    assert found.shape == (256, 512) and found.dtype == jnp.bfloat16
    bits = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(256, 512).astype(np.int64)
    # e2m1: a sign, two bits of exponent with bias 1 (0: subnormal), one of mantissa.
    exponent, mantissa = bits >> 1 & 3, bits & 1
    values = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    values = np.where(bits >> 3, -values, values)[:255] * 2.0 ** (np.arange(255)[:, None] - 127)
    exact = np.where(np.abs(values) < 2.0**128, values, np.copysign(np.inf, values))
    np.testing.assert_array_equal(found[:255].astype(np.float64), exact)
    assert np.isnan(found[255].astype(np.float32)).all()


def test_mxfp4_that_is_broken(tmp_path):
    folder = shutil.copytree(DATA / "gpt_oss_mxfp4", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    scales = "model.layers.1.mlp.experts.down_proj_scales"
    whole = tensors[scales]
    tensors[scales] = whole.at[0, 0, 0].set(255)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"not finite: blocks.1.mlp.down"):
        open_checkpoint(str(folder))
    del tensors[scales]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks.1.mlp.down\n"):
        open_checkpoint(str(folder))


def test_longrope_factor_is_that_of_the_paper():
    scaling = config_from_hf(PHI3).rope_scaling
    assert scaling == RopeScaling(
        "longrope",
        32.0,
        4096,
        short_factors=scaling.short_factors,
        long_factors=scaling.long_factors,
    )
    # What llama.cpp's converter wrote into the GGUF of this model.
    assert config_from_hf(PHI3).rotary(0).amplitude == pytest.approx(1.190238118171692, rel=1e-7)
