"""Reads Hugging Face folders: config.json, safetensors (perhaps in shards), tokenizer.json."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sinkjax.models import Config, Decoder
from sinkjax.models.families import config_from_hf, weights_from_hf
from sinkjax.text.tokenizer import Tokenizer

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load(path: str | Path, dtype=jnp.float32) -> tuple[Config, Decoder, Tokenizer | None]:
    """The model in a Hugging Face folder, and its tokenizer if it has one.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is corrupt or truncated, or the model is not supported.
    """
    folder = Path(path)
    config = config_from_hf(read_json(folder / "config.json"))
    tokenizer = None
    if (file := folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(file)
    weights = weights_from_hf(config, _tensors(_shards(folder)), dtype)
    return config, Decoder.from_weights(config, weights, dtype), tokenizer


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _shards(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks shards of its index: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    raise FileNotFoundError(
        f"{folder} has no weights that are read here: expected {_WHOLE} or {_INDEX}"
    )


def _tensors(shards: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{shard} is corrupt or truncated: {error}") from error
