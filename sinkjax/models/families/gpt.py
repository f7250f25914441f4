"""What the families between GPT-2 and Llama share: projections fused in several ways, biases on
everything, MLPs without a gate."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sinkjax.models.config import Config
from sinkjax.models.families.common import Source, Values, Weight, plain, transposed

Layout = Callable[[Config, np.ndarray], list[np.ndarray]]  # rows of q, of k, of v
# Switches of all of them but MPT.
GPT = {"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True}


def grouped(config: Config, x: np.ndarray) -> list[np.ndarray]:
    """Rows that are fused as: for each KV head its queries, its key, its value."""
    heads = x.reshape(config.kv_heads, -1, config.head_dim, *x.shape[1:])
    parts = heads[:, :-2], heads[:, -2], heads[:, -1]
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def in_blocks(config: Config, x: np.ndarray) -> list[np.ndarray]:
    """Rows that are fused as: all queries, all keys, all values."""
    ends = np.cumsum([config.heads, config.kv_heads]) * config.head_dim
    return np.split(x, ends)


def qkv(hf: str, layout: Layout) -> tuple[Weight, ...]:
    """The rows of queries, keys and values, and of their biases, that a file holds fused.

    Args:
        hf: the name in a Hugging Face checkpoint, without `.weight`.
        layout: there. llama.cpp writes all families in blocks.
    """

    def part(name: str, number: int, split: Layout) -> Source:
        def make(config: Config, x: np.ndarray) -> np.ndarray:
            if x.shape[0] != (config.heads + 2 * config.kv_heads) * config.head_dim:
                return x.T  # misshapen, and reported as such when the model is made
            return split(config, x)[number].T

        return Source((name,), make)

    return tuple(
        Weight(
            f"blocks.{{}}.attention.{letter}{here}",
            part(f"{hf}.{there}", number, layout),
            part(f"blk.{{}}.attn_qkv.{there}", number, in_blocks),
        )
        for number, letter in enumerate("qkv")
        for here, there in (("", "weight"), ("_bias", "bias"))
    )


def both(path: str, hf: str, gguf: str | None = None) -> tuple[Weight, Weight]:
    """The rows of a norm or matrix and of its bias. Names are without `.weight`."""
    make = plain if path.endswith(("norm", "head")) else transposed
    return (
        Weight(path, make(f"{hf}.weight"), None if gguf is None else make(f"{gguf}.weight")),
        Weight(
            f"{path}_bias", plain(f"{hf}.bias"), None if gguf is None else plain(f"{gguf}.bias")
        ),
    )


def layer(hf: str, names: dict[str, tuple[str, str | None]]) -> tuple[Weight, ...]:
    """The rows of what every layer has.

    Args:
        hf: what all names begin with in a Hugging Face checkpoint.
        names: by path, the rest of the name there, and in GGUF.
    """
    rows = (
        both(f"blocks.{{}}.{path}", f"{hf}.{name}", None if gguf is None else f"blk.{{}}.{gguf}")
        for path, (name, gguf) in names.items()
    )
    return tuple(row for pair in rows for row in pair)


def switch(values: Values, key: str, default: bool) -> bool:
    """The true or false that config.json has at `key`. Raises ValueError: something else."""
    value: Any = values.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value
