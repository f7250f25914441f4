"""Mixtral: Mistral with experts. Its GGUF files say `llama`."""

from typing import Any

from sinkjax.models.config import Config, Experts
from sinkjax.models.families.common import WEIGHTS, Family, Values, common_from_hf, whole
from sinkjax.models.families.experts import MIXTRAL


def _from_hf(hf: Values) -> dict[str, Any]:
    common = common_from_hf({"rope_theta": 1e6, "rms_norm_eps": 1e-5, **hf})
    chosen = whole(hf, "num_experts_per_tok", 2)
    experts = Experts(whole(hf, "num_local_experts", 8), chosen, common["intermediate_size"])
    window = None if hf.get("sliding_window") is None else whole(hf, "sliding_window")
    return common | {"experts": experts, "sliding_window": window}


FAMILY = Family(
    name="mixtral",
    from_hf=_from_hf,
    weights=tuple(row for row in WEIGHTS if ".mlp." not in row.path) + MIXTRAL,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "mixtral-8x7b": Config(
        family="mixtral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_base=1_000_000.0,
        trained_context=32_768,
        experts=Experts(count=8, chosen=2, intermediate_size=14_336),
    ),
}
