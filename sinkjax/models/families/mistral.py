"""Mistral 7B and its kin: Llama with a sliding window. Their GGUF files say `llama`."""

from typing import Any

from sinkjax.models.families.common import WEIGHTS, Family, Values, whole


def _from_hf(hf: Values) -> dict[str, Any]:
    # v0.1 has a window, later versions say null; a config that says nothing is as v0.1.
    if "sliding_window" in hf and hf["sliding_window"] is None:
        return {"sliding_window": None}
    return {"sliding_window": whole(hf, "sliding_window", 4096)}


FAMILY = Family(name="mistral", from_hf=_from_hf, weights=WEIGHTS)
