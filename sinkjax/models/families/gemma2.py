"""Gemma 2: every other layer is local, attention and MLP are normalised on both sides, scores and
logits are capped."""

from typing import Any

from sinkjax.models.config import Config
from sinkjax.models.families.alternating import alternating, alternating_from_gguf
from sinkjax.models.families.common import Family, Shapes, Values, own_values, whole
from sinkjax.models.families.gemma import BODY, gemma_from_gguf, gemma_from_hf, norm

NORMS = (
    norm("attention_norm", "input_layernorm.weight", "attn_norm.weight"),
    norm("post_attention_norm", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    norm("mlp_norm", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    norm("post_mlp_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)


def cap(values: Values, key: str, default: float | None = None) -> float | None:
    """The soft cap at `key`, null where there is none.

    Raises:
        ValueError: it is no number > 0.
    """
    value = values.get(key, default)
    if value is not None and not (isinstance(value, int | float) and value > 0):
        raise ValueError(f"{key} must be a number > 0, or null for none, got {value!r}")
    return None if value is None else float(value)


def scale(hf: Values) -> float:
    """`attention_scale`, from config.json. Raises ValueError: no number > 0."""
    value = hf.get("query_pre_attn_scalar", 256)
    if not (isinstance(value, int | float) and value > 0):
        raise ValueError(f"query_pre_attn_scalar must be a number > 0, got {value!r}")
    return value**-0.5


def scale_from_gguf(metadata: Values, largest: int) -> dict[str, Any]:
    """`attention_scale` of the model of so many layers, the 27B: it is not that of its heads, and
    the metadata does not say so. llama.cpp goes by the layers too."""
    own = own_values(metadata)
    if whole(own, "block_count") != largest:
        return {}
    width = whole(own, "embedding_length") / whole(own, "attention.head_count")
    return {"attention_scale": width**-0.5}


def _from_hf(hf: Values) -> dict[str, Any]:
    own = {
        "post_norms": True,
        "attention_scale": scale(hf),
        "attention_soft_cap": cap(hf, "attn_logit_softcapping", 50.0),
        "logit_soft_cap": cap(hf, "final_logit_softcapping", 30.0),
    }
    act = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    return gemma_from_hf(hf, act) | own | alternating({"sliding_window": 4096, **hf}, 2)


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    own = own_values(metadata)
    return (
        gemma_from_gguf(metadata)
        | {
            "post_norms": True,
            "attention_soft_cap": cap(own, "attn_logit_softcapping", 50.0),
            "logit_soft_cap": cap(own, "final_logit_softcapping", 30.0),
        }
        | scale_from_gguf(metadata, 46)
        | alternating_from_gguf(metadata, 2, window=4096)
    )


FAMILY = Family(
    name="gemma2",
    from_hf=_from_hf,
    weights=BODY + NORMS,
    architecture="gemma2",
    from_gguf=_from_gguf,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "gemma-2-9b": Config(
        family="gemma2",
        vocab_size=256_000,
        hidden_size=3584,
        intermediate_size=14_336,
        layers=42,
        heads=16,
        kv_heads=8,
        head_dim=256,
        norm_eps=1e-6,
        trained_context=8192,
        post_norms=True,
        attention_scale=256**-0.5,
        attention_soft_cap=50.0,
        sliding_window=4096,
        local_layers=(True, False) * 21,
        activation="gelu_tanh",
        embedding_scale=3584**0.5,
        logit_soft_cap=30.0,
        tied_embeddings=True,
    ),
}
