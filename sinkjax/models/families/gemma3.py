"""Gemma 3: five local layers to a global one, each kind with rotary positions of its own, and
queries and keys that are normalised. Of the models that see, the part that reads and writes."""

import dataclasses
from typing import Any

from sinkjax.models.families.alternating import alternating, alternating_from_gguf
from sinkjax.models.families.common import Family, Shapes, Values, Weight, own_values, whole
from sinkjax.models.families.gemma import BODY, gemma_from_gguf, gemma_from_hf, norm
from sinkjax.models.families.gemma2 import NORMS, cap, scale, scale_from_gguf

# What the files of the models that see leave out.
_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 4096,
}
_PERIOD = 6
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _from_hf(hf: Values) -> dict[str, Any]:
    hf = {**_DEFAULTS, **hf}
    if hf.get("attn_logit_softcapping") is not None:
        raise ValueError(
            f"attn_logit_softcapping {hf['attn_logit_softcapping']!r} is not supported with "
            "Gemma 3: expected null"
        )
    rope = hf.get("rope_parameters") or {}  # of both kinds of layers
    if unknown := set(rope) - {_GLOBAL, _LOCAL}:
        raise ValueError(
            f"rope_parameters with {', '.join(sorted(unknown))} are not supported with Gemma 3: "
            f"expected {_GLOBAL} and {_LOCAL}"
        )
    of_all = {**(hf.get("rope_scaling") or {}), **(rope.get(_GLOBAL) or {})}
    local = rope.get(_LOCAL) or {}
    if (kind := local.get("rope_type", "default")) != "default":
        raise ValueError(
            f"rope_type {kind!r} of the layers with a sliding window is not supported: "
            "expected 'default'"
        )
    base = local.get("rope_theta") or hf["rope_local_base_freq"]
    act = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    pattern = whole(hf, "sliding_window_pattern", hf.get("_sliding_window_pattern") or _PERIOD)
    own = {
        "post_norms": True,
        "qk_norm": True,
        "local_rope_base": float(base),
        "attention_scale": scale(hf),
        "logit_soft_cap": cap(hf, "final_logit_softcapping"),
    }
    common = gemma_from_hf({**hf, "rope_scaling": None, "rope_parameters": of_all}, act)
    return common | own | alternating(hf, pattern)


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    own = own_values(metadata)
    return (
        gemma_from_gguf(metadata)
        | {
            "post_norms": True,
            "qk_norm": True,
            "local_rope_base": float(own.get("rope.freq_base_swa", 1e4)),
            "logit_soft_cap": cap(own, "final_logit_softcapping"),
        }
        | scale_from_gguf(metadata, 62)
        | alternating_from_gguf(metadata, _PERIOD)
    )


def _elsewhere(prefix: str, row: Weight) -> Weight:
    """A row for files that have the model deeper down."""
    assert row.hf is not None
    (name,) = row.hf.names
    at = f"{prefix}.{name}"
    if prefix == "model.language_model":  # as transformers has named it since 4.52
        at = name if name.startswith("lm_head") else name.replace("model.", f"{prefix}.", 1)
    return Weight(row.path, row.hf._replace(names=(at,)))


_WEIGHTS = (
    *BODY,
    *NORMS,
    norm("attention.q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    norm("attention.k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
)
FAMILY = Family(
    name="gemma3_text",
    from_hf=_from_hf,
    weights=_WEIGHTS,
    architecture="gemma3",
    from_gguf=_from_gguf,
)
SEEING = dataclasses.replace(
    FAMILY,
    name="gemma3",
    from_hf=lambda hf: _from_hf(hf.get("text_config") or {}),
    weights=tuple(
        _elsewhere(prefix, row)
        for prefix in ("model.language_model", "language_model")
        for row in _WEIGHTS
    ),
    prefix="",
    ignored=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
    architecture=None,
)
