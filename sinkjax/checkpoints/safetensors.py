"""Reads Hugging Face folders: config.json, safetensors (perhaps in shards), tokenizer.json."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from sinkjax.models import Config, Decoder
from sinkjax.models.families import config_from_hf, weights_from_hf
from sinkjax.text.tokenizer import Tokenizer

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}


def load(
    path: str | Path, dtype=jnp.float32, mesh: Mesh | None = None, weight_dtype: str | None = None
) -> tuple[Config, Decoder, Tokenizer | None]:
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
    weights = weights_from_hf(config, Tensors(_shards(folder)))
    return config, Decoder.from_weights(config, weights, dtype, mesh, weight_dtype), tokenizer


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


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files by name. None is read before it is used.

    What `[name]` gives is a view of the file: a slice of it reads no more than the slice. Copy
    what you keep, for the file may change or go; once the view is gone, its pages are no longer
    part of this process.

    Args:
        files: the shards of a checkpoint.

    Attributes:
        shapes: by name.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is corrupt or truncated, or has a type of numbers that numpy lacks.
    """

    def __init__(self, files: Iterable[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, np.dtype, int]] = {}
        for path in files:
            try:
                with safe_open(path, framework="numpy") as file:  # checks all of the header
                    self._add(path, {name: file.get_slice(name) for name in file.keys()})
            except SafetensorError as error:
                raise ValueError(f"{path} is corrupt or truncated: {error}") from error

    def _add(self, path: Path, tensors: dict[str, Any]) -> None:
        # safe_open maps the whole file for as long as it is open, and says no offsets.
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, tensor in tensors.items():
            kind = tensor.get_dtype()
            if kind not in _DTYPES:
                raise ValueError(f"{path}: tensors of type {kind} ({name}) are not read")
            self.shapes[name] = tuple(tensor.get_shape())
            start = 8 + size + header[name]["data_offsets"][0]
            self._places[name] = path, np.dtype(_DTYPES[kind]), start

    def __getitem__(self, name: str) -> np.ndarray:
        path, dtype, start = self._places[name]
        shape = self.shapes[name]
        if 0 in shape:  # nothing to map
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
