"""Llama 2, 3, 3.1 and later, and what has their architecture: SmolLM2, TinyLlama, …

In GGUF this is the architecture of Mistral and Mixtral too.
"""

from typing import Any

from sinkjax.models.config import Config
from sinkjax.models.families.common import (
    MLP_BIAS,
    OUT_BIAS,
    QKV_BIAS,
    WEIGHTS,
    Family,
    Shapes,
    Values,
    common_from_hf,
    permuted,
)
from sinkjax.models.families.experts import MIXTRAL


def _from_hf(hf: Values) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", False))
    return common_from_hf(hf) | {"qkv_bias": bias, "out_bias": bias}


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    # The metadata does not say; the tensors do.
    return {
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "out_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in shapes,
    }


_EXPERTS = tuple(row._replace(hf=None) for row in MIXTRAL)
FAMILY = Family(
    name="llama",
    from_hf=_from_hf,
    weights=permuted(_EXPERTS + WEIGHTS + QKV_BIAS + OUT_BIAS + MLP_BIAS),
    architecture="llama",
    from_gguf=_from_gguf,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "llama-2-7b": Config(
        family="llama",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        rope_base=10_000.0,
        trained_context=4096,
    ),
    "llama-2-70b": Config(
        family="llama",
        vocab_size=32_000,
        hidden_size=8192,
        intermediate_size=28_672,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_base=10_000.0,
        trained_context=4096,
    ),
    "llama-3-8b": Config(
        family="llama",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_base=500_000.0,
        trained_context=8192,
    ),
    "llama-3-70b": Config(
        family="llama",
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_base=500_000.0,
        trained_context=8192,
    ),
    "smollm2-135m": Config(
        family="llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        norm_eps=1e-5,
        rope_base=100_000.0,
        trained_context=8192,
        tied_embeddings=True,
    ),
}
