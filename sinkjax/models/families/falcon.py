"""Falcon: 7B (one KV head), 40B, 180B and 11B (the "new architecture"), and Falcon-RW (ALiBi)."""

from typing import Any

from sinkjax.models.config import Config
from sinkjax.models.families.common import (
    Family,
    Shapes,
    Source,
    Values,
    Weight,
    common_from_hf,
    plain,
    whole,
)
from sinkjax.models.families.gpt import GPT, both, grouped, layer, qkv, switch
from sinkjax.models.positions import Alibi


def _from_hf(hf: Values) -> dict[str, Any]:
    heads, hidden = whole(hf, "num_attention_heads"), whole(hf, "hidden_size")
    new = switch(hf, "new_decoder_architecture", False)
    parallel = switch(hf, "parallel_attn", True)
    if new:
        kv_heads = whole(hf, "num_kv_heads", heads)
    else:  # where files may have a `num_kv_heads` that means nothing
        kv_heads = 1 if switch(hf, "multi_query", True) else heads
    norms = whole(hf, "num_ln_in_parallel_attn", 2 if new else 1)
    if norms not in ((1, 2) if new else (1,)):
        raise ValueError(
            f"num_ln_in_parallel_attn {norms} is not supported: expected 1, or 2 with "
            "new_decoder_architecture"
        )
    if new and not parallel:
        raise ValueError("parallel_attn False with new_decoder_architecture is not supported")
    sizes = {
        "num_key_value_heads": kv_heads,
        "intermediate_size": whole(hf, "ffn_hidden_size", 4 * hidden),
        "max_position_embeddings": whole(hf, "max_position_embeddings", 2048),
        "hidden_act": hf.get("activation", "gelu"),
        "tie_word_embeddings": switch(hf, "tie_word_embeddings", True),
    }
    bias = switch(hf, "bias", False)
    own: dict[str, Any] = {
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "parallel": parallel,
        "shared_norm": parallel and norms == 1,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
    }
    if switch(hf, "alibi", False):
        # The bias is added before the scores are scaled, not after as elsewhere. transformers
        # rounds it to bfloat16, which is no function of the distance; that is left out here.
        own["alibi"] = Alibi(scale=(hidden // max(heads, 1)) ** -0.5)
    return common_from_hf({**hf, **sizes}) | GPT | own


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    # llama.cpp knows those with rotary positions alone, which are all parallel and have no bias.
    return GPT | {
        "activation": "gelu",
        "parallel": True,
        "shared_norm": "blk.0.attn_norm_2.weight" not in shapes,
        "mlp_bias": False,
    }


def _if_two(kind: str) -> Source:
    """The norm before the MLP, in GGUF the first: the second is the one before attention."""
    names = f"blk.{{}}.attn_norm.{kind}", f"blk.{{}}.attn_norm_2.{kind}"
    return Source(names, lambda config, first, second: first)


_LAYER = "transformer.h.{}"
FAMILY = Family(
    name="falcon",
    from_hf=_from_hf,
    weights=(
        Weight("embed", plain("transformer.word_embeddings.weight"), plain("token_embd.weight")),
        *both("norm", "transformer.ln_f", "output_norm"),
        Weight("head", plain("lm_head.weight"), plain("output.weight")),
        *qkv(f"{_LAYER}.self_attention.query_key_value", grouped),
        *layer(_LAYER, {"attention_norm": ("ln_attn", "attn_norm_2")}),
        *layer(_LAYER, {"attention_norm": ("input_layernorm", "attn_norm")}),
        Weight("blocks.{}.mlp_norm", plain(f"{_LAYER}.ln_mlp.weight"), _if_two("weight")),
        Weight("blocks.{}.mlp_norm_bias", plain(f"{_LAYER}.ln_mlp.bias"), _if_two("bias")),
        *layer(
            _LAYER,
            {
                "mlp_norm": ("post_attention_layernorm", None),
                "attention.out": ("self_attention.dense", "attn_output"),
                "mlp.up": ("mlp.dense_h_to_4h", "ffn_up"),
                "mlp.down": ("mlp.dense_4h_to_h", "ffn_down"),
            },
        ),
    ),
    prefix="transformer.",
    architecture="falcon",
    from_gguf=_from_gguf,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "falcon-7b": Config(
        family="falcon",
        vocab_size=65_024,
        hidden_size=4544,
        intermediate_size=18_176,
        layers=32,
        heads=71,
        kv_heads=1,
        head_dim=64,
        norm_eps=1e-5,
        trained_context=2048,
        norm="layer",
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        activation="gelu",
        gated=False,
        tied_embeddings=True,
    ),
}
