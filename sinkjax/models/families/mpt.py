"""MPT: ALiBi, and no bias anywhere. transformers ignores several of its switches; MPT's own code
and this file do not."""

from typing import Any

from sinkjax.models.config import Config
from sinkjax.models.families.common import (
    Family,
    Shapes,
    Values,
    Weight,
    common_from_hf,
    own_values,
    plain,
    whole,
)
from sinkjax.models.families.gpt import both, in_blocks, layer, qkv, switch
from sinkjax.models.positions import Alibi

_OWN = {"norm": "layer", "gated": False, "activation": "gelu"}


def _from_hf(hf: Values) -> dict[str, Any]:
    attention = hf.get("attn_config") or {}
    expected: tuple[tuple[Values, str, Any, Any], ...] = (  # where, its default, what is built
        (attention, "alibi", True, True),
        (attention, "attn_type", "multihead_attention", "multihead_attention"),
        (attention, "prefix_lm", False, False),
        (attention, "qk_ln", False, False),
        (attention, "rope", False, False),
        (hf, "no_bias", True, True),
        (hf, "logit_scale", None, None),
    )
    for values, key, default, wanted in expected:
        if (value := values.get(key, default)) != wanted:
            raise ValueError(f"{key} {value!r} is not supported: expected {wanted!r}")
    norm = hf.get("norm_type", "low_precision_layernorm")
    if norm not in ("layernorm", "low_precision_layernorm"):
        raise ValueError(f"norm_type {norm!r} is not supported: expected 'layernorm'")
    hidden = whole(hf, "d_model")
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": whole(hf, "expansion_ratio", 4) * hidden,
        "num_hidden_layers": whole(hf, "n_layers"),
        "num_attention_heads": whole(hf, "n_heads"),
        "max_position_embeddings": whole(hf, "max_seq_len", 2048),
        "tie_word_embeddings": switch(hf, "tie_word_embeddings", True),
    }
    scale = attention.get("softmax_scale")
    own = {
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "alibi": Alibi(largest=float(attention.get("alibi_bias_max", 8))),
        "qkv_clip": _clip(attention.get("clip_qkv")),
        "attention_scale": None if scale is None else float(scale),
    }
    return common_from_hf({**hf, **sizes}) | _OWN | own


def _clip(limit: float | None) -> float | None:
    return float(limit) if limit else None  # MPT takes 0 for none


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    own = own_values(metadata)
    largest = float(own.get("attention.max_alibi_bias", 0.0))
    if not largest > 0:
        raise ValueError(
            "attention.max_alibi_bias is 0: MPT with learned positions is not supported"
        )
    clip = _clip(own.get("attention.clamp_kqv"))
    return _OWN | {"alibi": Alibi(largest=largest), "qkv_clip": clip}


_LAYER = "transformer.blocks.{}"
FAMILY = Family(
    name="mpt",
    from_hf=_from_hf,
    weights=(
        Weight("embed", plain("transformer.wte.weight"), plain("token_embd.weight")),
        *both("norm", "transformer.norm_f", "output_norm"),
        Weight("head", plain("lm_head.weight"), plain("output.weight")),
        *qkv(f"{_LAYER}.attn.Wqkv", in_blocks),
        *layer(
            _LAYER,
            {
                "attention_norm": ("norm_1", "attn_norm"),
                "mlp_norm": ("norm_2", "ffn_norm"),
                "attention.out": ("attn.out_proj", "attn_output"),
                "mlp.up": ("ffn.up_proj", "ffn_up"),
                "mlp.down": ("ffn.down_proj", "ffn_down"),
            },
        ),
    ),
    prefix="transformer.",
    architecture="mpt",
    from_gguf=_from_gguf,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "mpt-7b": Config(
        family="mpt",
        vocab_size=50_432,
        hidden_size=4096,
        intermediate_size=16_384,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        trained_context=2048,
        alibi=Alibi(),
        norm="layer",
        activation="gelu",
        gated=False,
        tied_embeddings=True,
    ),
}
