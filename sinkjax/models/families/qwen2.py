"""Qwen 2 and 2.5: biases on queries, keys and values."""

from typing import Any

from sinkjax.models.families.common import (
    QKV_BIAS,
    WEIGHTS,
    Family,
    Values,
    common_from_hf,
    window_by_layer,
)


def _from_hf(hf: Values) -> dict[str, Any]:
    return common_from_hf(hf) | {"qkv_bias": True} | window_by_layer(hf)


FAMILY = Family(
    name="qwen2",
    from_hf=_from_hf,
    weights=WEIGHTS + QKV_BIAS,
    architecture="qwen2",
    from_gguf=lambda metadata, shapes: {"qkv_bias": True},
)
