"""Qwen 3 with experts: in all layers, or with a plain MLP in some."""

from typing import Any

from sinkjax.models.config import Config, Experts
from sinkjax.models.families.common import (
    OUT_BIAS,
    QK_NORM,
    QKV_BIAS,
    WEIGHTS,
    Family,
    Values,
    common_from_hf,
    whole,
)
from sinkjax.models.families.experts import experts


def _from_hf(hf: Values) -> dict[str, Any]:
    layers = whole(hf, "num_hidden_layers")
    step, dense = whole(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if step < 1 or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
        raise ValueError(
            f"decoder_sparse_step {step} with mlp_only_layers {dense!r}: expected a step ≥ 1, and "
            f"numbers of layers from 0 to {layers - 1}"
        )
    sparse = tuple((i + 1) % step == 0 and i not in dense for i in range(layers))
    moe = None
    if any(sparse):
        moe = Experts(
            whole(hf, "num_experts", hf.get("num_local_experts")),
            whole(hf, "num_experts_per_tok", 8),
            whole(hf, "moe_intermediate_size", 768),
            normalise=bool(hf.get("norm_topk_prob", False)),
            layers=None if all(sparse) else sparse,
        )
    bias = bool(hf.get("attention_bias", False))
    window = whole(hf, "sliding_window", 4096) if hf.get("use_sliding_window") else None
    own = {"qk_norm": True, "qkv_bias": bias, "out_bias": bias, "experts": moe}
    return common_from_hf(hf) | own | {"sliding_window": window}


FAMILY = Family(
    name="qwen3_moe",
    from_hf=_from_hf,
    weights=WEIGHTS
    + QKV_BIAS
    + OUT_BIAS
    + QK_NORM
    + experts(
        "mlp.gate.weight",
        "mlp.experts.{x}.gate_proj.weight",
        "mlp.experts.{x}.up_proj.weight",
        "mlp.experts.{x}.down_proj.weight",
    ),
    architecture="qwen3moe",
    from_gguf=lambda metadata, shapes: {"qk_norm": True},
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "qwen3-30b-a3b": Config(
        family="qwen3_moe",
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        norm_eps=1e-6,
        rope_base=1_000_000.0,
        trained_context=40_960,
        qk_norm=True,
        experts=Experts(count=128, chosen=8, intermediate_size=768),
    ),
}
