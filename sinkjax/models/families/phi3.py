"""Phi-3, 3.5 and 4 (but those with experts): Llama with fused projections, and LongRoPE."""

from typing import Any

import numpy as np

from sinkjax.models.config import Config
from sinkjax.models.families.common import (
    ATTENTION,
    ENDS,
    MLP,
    NORMS,
    Family,
    Source,
    Values,
    Weight,
    common_from_hf,
    whole,
)
from sinkjax.models.families.gpt import in_blocks, qkv
from sinkjax.models.positions import RopeScaling


def _from_hf(hf: Values) -> dict[str, Any]:
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = dict(hf.get(key) or {})
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ValueError(
            f"rope scaling {kind!r} is not supported with Phi-3: expected longrope or none"
        )
    rope["rope_type"] = "longrope" if kind == "yarn" else kind  # one that never was YaRN
    # The one outside is what counts, and by default it is that of the first Phi-3.
    rope["original_max_position_embeddings"] = whole(hf, "original_max_position_embeddings", 4096)
    window = None if hf.get("sliding_window") is None else whole(hf, "sliding_window")
    return common_from_hf({"rms_norm_eps": 1e-5, **hf, key: rope}) | {"sliding_window": window}


def _half(number: int, name: str) -> Source:
    def make(config: Config, x: np.ndarray) -> np.ndarray:
        if x.shape[0] != 2 * config.intermediate_size:
            return x.T  # misshapen, and reported as such when the model is made
        return np.split(x, 2)[number].T

    return Source((name,), make)


def _fused(number: int, path: str) -> Weight:
    hf, gguf = "model.layers.{}.mlp.gate_up_proj.weight", "blk.{}.ffn_up.weight"
    return Weight(f"blocks.{{}}.mlp.{path}", _half(number, hf), _half(number, gguf))


FAMILY = Family(
    name="phi3",
    from_hf=_from_hf,
    weights=(
        *ENDS,
        *NORMS,
        *qkv("model.layers.{}.self_attn.qkv_proj", in_blocks),
        *(row for row in ATTENTION if row.path.endswith(".out")),
        *(_fused(number, path) for number, path in enumerate(("gate", "up"))),
        *(row for row in MLP if row.path.endswith(".down")),
    ),
    ignored=r"rope_factors_(long|short)\.weight",
    architecture="phi3",
)

# Of Phi-3-mini-128k, rounded to the digits that were chosen for it.
_SHORT = (
    (1.1,) * 3 + (1.3, 1.35, 1.35, 1.4, 1.55) + (2.0,) * 17 + (2.05,) * 6 + (2.1, 2.1, 2.15)
    + (2.25,) * 5 + (2.4, 2.45, 2.5, 2.7, 2.7, 2.75, 2.8, 2.9, 3.05)
)  # fmt: skip
_LONG = (
    1.07, 1.12, 1.15, 1.42, 1.57, 1.8, 2.13, 2.13, 3.01, 5.91, 6.95, 9.07, 9.93, 10.71, 11.13,
    14.61, 15.41, 19.81, 37.28, 38.28, 38.6, 40.12, 46.2, 50.94, 53.66, 54.93739, 56.89739,
    57.28739, 59.98738, 60.86739, 60.88739, 61.71739, 62.91739, 62.95739, 63.41739, 63.81739,
    63.83739, 63.8974, 63.9374, 64.0674, 64.11435, 64.12435, 64.15435, 64.19435, 64.24435,
    64.57436, 64.69, 64.76,
)  # fmt: skip

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "phi-3-mini-128k": Config(
        family="phi3",
        vocab_size=32_064,
        hidden_size=3072,
        intermediate_size=8192,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=96,
        norm_eps=1e-5,
        rope_scaling=RopeScaling("longrope", 32.0, 4096, short_factors=_SHORT, long_factors=_LONG),
        trained_context=131_072,
        sliding_window=262_144,
    ),
}
