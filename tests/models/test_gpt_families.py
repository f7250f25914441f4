"""The config.json of the families between GPT-2 and Llama, as the hub has them."""

import pytest

from sinkjax.models import Config
from sinkjax.models.families import config_from_hf, falcon, gpt_neox, mpt
from sinkjax.models.positions import Alibi

PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50432,
}
GPTJ = {
    "model_type": "gptj",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}
FALCON = {
    "model_type": "falcon",
    "alibi": False,
    "bias": False,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_40B = FALCON | {
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
MPT = {
    "model_type": "mpt",
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "vocab_size": 50432,
}
BLOOM = {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "layer_norm_epsilon": 1e-05,
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "seq_length": 2048,
    "vocab_size": 250880,
}


def attention(**changes):
    return {"attn_config": MPT["attn_config"] | changes}


@pytest.mark.parametrize(
    ("hf", "preset"),
    [
        (PYTHIA, gpt_neox.PRESETS["pythia-6.9b"]),
        (FALCON, falcon.PRESETS["falcon-7b"]),
        (MPT, mpt.PRESETS["mpt-7b"]),
    ],
)
def test_presets(hf, preset):
    assert config_from_hf(hf) == preset


def test_sizes_of_gptj_and_bloom():
    common = {"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True}
    common |= {"norm_eps": 1e-5, "trained_context": 2048, "activation": "gelu_tanh"}
    gptj = Config(
        family="gptj", vocab_size=50_400, hidden_size=4096, intermediate_size=16_384, layers=28,
        heads=16, kv_heads=16, head_dim=256, rotary_dim=64, parallel=True, shared_norm=True,
        head_bias=True, **common,
    )  # fmt: skip
    assert config_from_hf(GPTJ) == gptj
    bloom = Config(
        family="bloom", vocab_size=250_880, hidden_size=1024, intermediate_size=4096, layers=24,
        heads=16, kv_heads=16, head_dim=64, alibi=Alibi(), embedding_norm=True, qkv_bias=True,
        out_bias=True, tied_embeddings=True, **common,
    )  # fmt: skip
    assert config_from_hf(BLOOM) == bloom
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "n_head": 16, "n_embed": None}
    other = {k: v for k, v in BLOOM.items() if k not in ("n_layer", "num_attention_heads")}
    assert config_from_hf(other | sizes) == bloom


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        (PYTHIA | {"rotary_pct": 1.0}, {"rotary_dim": None}),
        (PYTHIA | {"rotary_emb_base": 500}, {"rope_base": 500.0}),
        (PYTHIA | {"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
        (PYTHIA | {"use_parallel_residual": False}, {"parallel": False}),
        (PYTHIA | {"attention_bias": False}, {"qkv_bias": False, "mlp_bias": True}),
        (GPTJ | {"n_inner": 1000}, {"intermediate_size": 1000}),
        (FALCON | {"num_kv_heads": 71}, {"kv_heads": 1}),
        (FALCON | {"multi_query": False}, {"kv_heads": 71}),
        (FALCON | {"parallel_attn": False}, {"parallel": False, "shared_norm": False}),
        (FALCON | {"alibi": True}, {"alibi": Alibi(scale=0.125)}),
        (FALCON | {"bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        (FALCON_40B, {"kv_heads": 8, "parallel": True, "shared_norm": False}),
        (FALCON_40B | {"num_ln_in_parallel_attn": 1}, {"shared_norm": True}),
        (FALCON_40B | {"rope_theta": 500_042}, {"rope_base": 500_042.0}),
        (FALCON_40B | {"ffn_hidden_size": 99}, {"intermediate_size": 99}),
        (MPT | attention(clip_qkv=6, alibi_bias_max=16), {"qkv_clip": 6.0, "alibi": Alibi(16.0)}),
        (MPT | attention(clip_qkv=0), {"qkv_clip": None}),
        (MPT | attention(softmax_scale=0.5), {"attention_scale": 0.5}),
        (MPT | {"expansion_ratio": 2}, {"intermediate_size": 8192}),
    ],
)
def test_switches(hf, expected):
    config = config_from_hf(hf)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (PYTHIA | {"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        (PYTHIA | {"use_parallel_residual": "yes"}, "must be true or false, got 'yes'"),
        (GPTJ | {"rotary_dim": None}, "rotary_dim null is not supported"),
        (GPTJ | {"rotary_dim": 300}, "even number of dimensions, 2 to head_dim 256, got 300"),
        (GPTJ | {"n_layer": None}, "no 'n_layer'"),
        (FALCON | {"bias": "false"}, "bias must be true or false, got 'false'"),
        (FALCON | {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 is not supported"),
        (FALCON_40B | {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3"),
        (FALCON_40B | {"parallel_attn": False}, "parallel_attn False with new_decoder"),
        (MPT | attention(alibi=False), "alibi False is not supported: expected True"),
        (MPT | attention(attn_type="multiquery_attention"), "attn_type 'multiquery_attention'"),
        (MPT | attention(prefix_lm=True), "prefix_lm True"),
        (MPT | attention(qk_ln=True), "qk_ln True"),
        (MPT | {"no_bias": False}, "no_bias False"),
        (MPT | {"logit_scale": "inv_sqrt_d_model"}, "logit_scale 'inv_sqrt_d_model'"),
        (MPT | {"norm_type": "rmsnorm"}, "norm_type 'rmsnorm'"),
        (MPT | {"d_model": None}, "no 'd_model'"),
        (BLOOM | {"apply_residual_connection_post_layernorm": True}, "post_layernorm True"),
    ],
)
def test_refused(hf, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf)
