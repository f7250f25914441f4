"""One file per family of models: its config, and its table of weight names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.models.config import Config
from sinkjax.models.families import llama, mistral, qwen2, qwen3
from sinkjax.models.families.common import Shapes, common_from_gguf, common_from_hf

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}
ARCHITECTURES = {f.architecture: f for f in FAMILIES.values() if f.architecture is not None}

_DROPPED = re.compile(r".*rotary_emb\.inv_freq|rope_freqs\.weight")  # computed from the config


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The config of a model, from its `config.json` (as transformers 4 or 5 writes it).

    Raises:
        ValueError: an unknown `model_type`, a missing size, or a switch that is not supported.
    """
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise ValueError(
            f"model_type {hf.get('model_type')!r} is not supported: "
            f"expected one of {', '.join(FAMILIES)}"
        )
    return Config(family=family.name, **{**common_from_hf(hf), **family.from_hf(hf)})


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Shapes, rope_factors: np.ndarray | None = None
) -> Config:
    """The config of a model, from its GGUF metadata.

    Args:
        metadata: by key.
        shapes: of the tensors, by name, the output axis first.
        rope_factors: the tensor `rope_freqs.weight` `[head_dim/2]`, if there is one: what each
            rotary frequency is divided by.

    Raises:
        ValueError: an unknown `general.architecture`, or as `config_from_hf`.
    """
    architecture = metadata.get("general.architecture")
    family = ARCHITECTURES.get(str(architecture))
    if family is None:
        raise ValueError(
            f"general.architecture {architecture!r} is not supported: "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    common = common_from_gguf(metadata, shapes, rope_factors)
    return Config(family=family.name, **{**common, **family.from_gguf(metadata, shapes)})


def weights_from_hf(
    config: Config, tensors: Iterable[tuple[str, np.ndarray]], dtype=jnp.float32
) -> dict[str, jax.Array]:
    """The weights that `Decoder.from_weights` takes, from those of a Hugging Face checkpoint.

    One tensor is taken at a time, so that the file's arrays need not all be in memory.

    Args:
        config: of the model.
        tensors: names and arrays. A name that the family does not have is kept as it is, for
            `Decoder.from_weights` to report.
        dtype: that the weights are cast to.
    """
    table = {weight.hf: weight for weight in FAMILIES[config.family].weights}
    return _weights(config, tensors, table, dtype, permuted=False)


def weights_from_gguf(
    config: Config, tensors: Iterable[tuple[str, np.ndarray]], dtype=jnp.float32
) -> dict[str, jax.Array]:
    """As `weights_from_hf`, from the dequantised tensors of a GGUF file."""
    family = FAMILIES[config.family]
    table = {weight.gguf: weight for weight in family.weights}
    return _weights(config, tensors, table, dtype, permuted=family.permuted)


def _weights(config, tensors, table, dtype, *, permuted) -> dict[str, jax.Array]:
    weights = {}
    for name, x in tensors:
        layer = re.search(r"\.(\d+)\.", name)
        weight = table.get(name if layer is None else name.replace(layer[1], "{}", 1))
        if _DROPPED.fullmatch(name):
            continue
        if weight is None:
            path = name
        else:
            path = weight.path if layer is None else weight.path.format(layer[1])
            x = weight.arrange(x, config, permuted=permuted)
        if path == "head" and config.tied_embeddings:
            continue  # a copy of the embedding, or never used
        # A copy, not a view of the file: the file may change or go.
        weights[path] = jnp.array(x, dtype=dtype)
    return weights
