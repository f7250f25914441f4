"""Qwen 3: queries and keys are normalised head by head, and heads have a size of their own."""

from typing import Any

from sinkjax.models.families.common import (
    OUT_BIAS,
    QK_NORM,
    QKV_BIAS,
    WEIGHTS,
    Family,
    Values,
    common_from_hf,
    whole,
    window_by_layer,
)


def _from_hf(hf: Values) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", False))
    own = {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}
    return (
        common_from_hf({**hf, "head_dim": whole(hf, "head_dim", 128)}) | own | window_by_layer(hf)
    )


FAMILY = Family(
    name="qwen3",
    from_hf=_from_hf,
    weights=WEIGHTS + QKV_BIAS + OUT_BIAS + QK_NORM,
    architecture="qwen3",
    from_gguf=lambda metadata, shapes: {"qk_norm": True},
)
