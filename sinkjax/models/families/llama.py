"""Llama 2, 3, 3.1 and later, and what has their architecture: SmolLM2, TinyLlama, …"""

from typing import Any

from sinkjax.models.families.common import OUT_BIAS, QKV_BIAS, WEIGHTS, Family, Shapes, Values


def _from_hf(hf: Values) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias}


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    # The metadata does not say; the tensors do.
    return {
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "out_bias": "blk.0.attn_output.bias" in shapes,
    }


FAMILY = Family(
    name="llama",
    from_hf=_from_hf,
    weights=WEIGHTS + QKV_BIAS + OUT_BIAS,
    architecture="llama",
    from_gguf=_from_gguf,
    permuted=True,
)
