"""One file per family of models: its config, and its table of weight names."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sinkjax.models.config import Config
from sinkjax.models.families import (
    bloom,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from sinkjax.models.families.common import Family, FileWeights, Shapes, common_from_gguf

_MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    gpt_neox,
    gptj,
    falcon,
    mpt,
    bloom,
    phi3,
    gemma,
    gemma2,
    gemma3,
    mixtral,
    qwen3_moe,
    gpt_oss,
)
# Configs by name, to ask a compiler about a model without its weights.
PRESETS = {name: c for m in _MODULES for name, c in getattr(m, "PRESETS", {}).items()}
FAMILIES = {module.FAMILY.name: module.FAMILY for module in _MODULES}
FAMILIES[gemma3.SEEING.name] = gemma3.SEEING
ARCHITECTURES = {f.architecture: f for f in FAMILIES.values() if f.architecture is not None}


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
    return Config(family=family.name, **family.from_hf(hf))


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Shapes,
    rope_factors: np.ndarray | None = None,
    longrope: tuple[np.ndarray, np.ndarray] | None = None,
) -> Config:
    """The config of a model, from its GGUF metadata.

    Args:
        metadata: by key.
        shapes: of the tensors, by name, the output axis first.
        rope_factors: the tensor `rope_freqs.weight` `[head_dim/2]`, if there is one: what each
            rotary frequency is divided by.
        longrope: the tensors `rope_factors_short.weight` and `rope_factors_long.weight`, likewise.

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
    common = common_from_gguf(metadata, shapes, rope_factors, longrope)
    return Config(family=family.name, **{**common, **family.from_gguf(metadata, shapes)})


def weights_from_hf(config: Config, tensors: Mapping[str, np.ndarray]) -> FileWeights:
    """The weights that `Decoder.from_weights` takes, from those of a Hugging Face checkpoint.

    Args:
        config: of the model.
        tensors: by name, perhaps read when they are asked for.
    """
    family = FAMILIES[config.family]
    rows = [(weight.path, weight.hf) for weight in family.weights if weight.hf is not None]
    return FileWeights(config, tensors, rows, prefix=family.prefix, ignored=_ignored(family))


def weights_from_gguf(config: Config, tensors: Mapping[str, np.ndarray]) -> FileWeights:
    """As `weights_from_hf`, from the dequantised tensors of a GGUF file."""
    family = FAMILIES[config.family]
    rows = [(weight.path, weight.gguf) for weight in family.weights if weight.gguf is not None]
    return FileWeights(config, tensors, rows, ignored=_ignored(family))


def _ignored(family: Family) -> Callable[[str], bool]:
    # What is computed from the config, and what a family says.
    pattern = re.compile(rf".*rotary_emb\.inv_freq|rope_freqs\.weight|{family.ignored or '(?!)'}")
    return lambda name: pattern.fullmatch(name) is not None
