"""Mistral 7B and its kin: Llama with a sliding window. Their GGUF files say `llama`."""

from typing import Any

from sinkjax.models.config import Config
from sinkjax.models.families.common import WEIGHTS, Family, Values, common_from_hf, whole


def _from_hf(hf: Values) -> dict[str, Any]:
    # v0.1 has a window, later versions say null; a config that says nothing is as v0.1.
    if "sliding_window" in hf and hf["sliding_window"] is None:
        return common_from_hf(hf)
    return common_from_hf(hf) | {"sliding_window": whole(hf, "sliding_window", 4096)}


FAMILY = Family(name="mistral", from_hf=_from_hf, weights=WEIGHTS)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "mistral-7b": Config(  # v0.1, the one with a window
        family="mistral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        trained_context=32_768,
        sliding_window=4096,
    ),
}
