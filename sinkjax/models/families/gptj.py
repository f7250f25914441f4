"""GPT-J. Its rotary pairs are neighbours, (0, 1), (2, 3), …: rows are reordered when loaded."""

from typing import Any

import numpy as np

from sinkjax.models.config import Config
from sinkjax.models.families.common import (
    Family,
    Source,
    Values,
    Weight,
    common_from_hf,
    plain,
    transposed,
    whole,
)
from sinkjax.models.families.gpt import GPT, both, layer


def _from_hf(hf: Values) -> dict[str, Any]:
    hidden = whole(hf, "n_embd")
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": whole(hf, "n_inner", 4 * hidden),
        "num_hidden_layers": whole(hf, "n_layer"),
        "num_attention_heads": whole(hf, "n_head"),
        "max_position_embeddings": whole(hf, "n_positions", 2048),
        "hidden_act": hf.get("activation_function", "gelu_new"),
    }
    if hf.get("rotary_dim", 64) is None:
        raise ValueError("rotary_dim null is not supported: expected a number of dimensions")
    return (
        common_from_hf({**hf, **sizes})
        | GPT
        | {
            "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
            "rotary_dim": whole(hf, "rotary_dim", 64),
            "parallel": True,
            "shared_norm": True,
            "head_bias": True,
        }
    )


def _halves(name: str) -> Source:
    """q or k with the first of all rotary pairs before the second of all."""

    def make(config: Config, x: np.ndarray) -> np.ndarray:
        if x.shape[0] != config.heads * config.head_dim:
            return x.T  # misshapen, and reported as such when the model is made
        first = np.arange(0, config.rotary_dim or config.head_dim, 2)
        order = [*first, *first + 1, *range(2 * len(first), config.head_dim)]
        return x.reshape(config.heads, config.head_dim, -1)[:, order].reshape(x.shape).T

    return Source((name,), make)


_LAYER = "transformer.h.{}"
FAMILY = Family(
    name="gptj",
    from_hf=_from_hf,
    weights=(
        Weight("embed", plain("transformer.wte.weight")),
        *both("norm", "transformer.ln_f"),
        *both("head", "lm_head"),
        Weight("blocks.{}.attention.q", _halves(f"{_LAYER}.attn.q_proj.weight")),
        Weight("blocks.{}.attention.k", _halves(f"{_LAYER}.attn.k_proj.weight")),
        Weight("blocks.{}.attention.v", transposed(f"{_LAYER}.attn.v_proj.weight")),
        *layer(
            _LAYER,
            {
                "attention_norm": ("ln_1", None),
                "attention.out": ("attn.out_proj", None),
                "mlp.up": ("mlp.fc_in", None),
                "mlp.down": ("mlp.fc_out", None),
            },
        ),
    ),
    prefix="transformer.",
    ignored=r".*\.attn\.(bias|masked_bias)",
)
