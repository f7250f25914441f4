"""Reads GGUF files, the format of llama.cpp.

The header is read here, by `struct`: the reader in the package `gguf` makes several numpy arrays
for each entry of the vocabulary, and takes 7 s where this takes 0.4 (49,152 tokens).
Tensors are dequantised by that package.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sinkjax.models import Config, Decoder
from sinkjax.models.families import config_from_gguf, weights_from_gguf
from sinkjax.text.tokenizer import Tokenizer

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AT_ONCE = 2**22  # numbers that are dequantised at once: it takes several arrays of their size


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file. `shape` has the output axis first, as in Hugging Face's."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int  # in bytes


class GGUFFile(Mapping[str, np.ndarray]):
    """A GGUF file: its metadata, and its tensors by name, each read when it is asked for.

    Args:
        path: of the file.

    Attributes:
        metadata: key → number, bool, string or list of those.
        tensors: name → `Tensor`.
        shapes: name → shape.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no whole GGUF file, or one of several parts.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{self.path} is no GGUF file: it does not begin with 'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                there = len(data)
                try:
                    self.metadata, self.tensors = _Header(data).read()
                except (ValueError, struct.error, OverflowError, MemoryError) as error:
                    raise ValueError(
                        f"{self.path} is a corrupt or truncated GGUF file: {error}"
                    ) from error
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        if (parts := self.metadata.get("split.count", 1)) > 1:
            raise ValueError(
                f"{self.path} is one of {parts} parts: merge them with llama.cpp's gguf-split"
            )
        needed = max((t.start + t.size for t in self.tensors.values()), default=0)
        if needed > there:
            raise ValueError(
                f"{self.path} is truncated: it has {there:,} bytes, its tensors end at "
                f"{needed:,}. Download it again"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in the shape that `tensors` says.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the package `gguf` does not dequantise its type.
        """
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start)
        rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)
        if tensor.kind.name in ("F32", "F16"):
            rows = rows.view(np.float32 if tensor.kind.name == "F32" else np.float16)
        x = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, _AT_ONCE // tensor.shape[-1])
        try:
            for i in range(0, len(rows), step):
                x[i : i + step] = gguf.dequantize(rows[i : i + step], tensor.kind)
        except NotImplementedError as error:
            raise ValueError(f"tensors of type {tensor.kind.name} ({name}) are not read") from error
        return x.reshape(tensor.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _Header:
    """The part of the file before the tensors' data. Little-endian, versions 2 and 3."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported: expected 2 or 3, little-endian")
        tensors, entries = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(entries):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        infos = [self.info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment must be a number ≥ 1, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return metadata, {
            name: dataclasses.replace(tensor, start=start + tensor.start) for name, tensor in infos
        }

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise ValueError(f"the header ends beyond the file, at {end:,} of {len(self.data):,}")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(self.scalar(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        size = struct.calcsize(self.scalar(kind))
        return list(struct.unpack(f"<{count}{self.scalar(kind)}", self.take(count * size)))

    def scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown type {kind} at byte {self.at:,}")
        return _SCALARS[kind]

    def info(self) -> tuple[str, Tensor]:
        name = self.string()
        axes = self.number("I")
        shape = tuple(reversed(struct.unpack(f"<{axes}Q", self.take(8 * axes))))
        kind = gguf.GGMLQuantizationType(self.number("I"))
        block, block_size = gguf.GGML_QUANT_SIZES[kind]
        if not math.prod(shape) or not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {shape} is not made of {kind.name} blocks")
        return name, Tensor(kind, shape, self.number("Q"), math.prod(shape) // block * block_size)


def load(
    path: str | Path, dtype=jnp.float32, mesh: Mesh | None = None, weight_dtype: str | None = None
) -> tuple[Config, Decoder, Tokenizer | None]:
    """The model in a GGUF file, and its tokenizer if it has one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is corrupt or truncated, or its model is not supported.
    """
    file = GGUFFile(path)
    factors = file.get("rope_freqs.weight")
    longrope = None
    if "rope_factors_long.weight" in file and "rope_factors_short.weight" in file:
        longrope = file["rope_factors_short.weight"], file["rope_factors_long.weight"]
    config = config_from_gguf(file.metadata, file.shapes, factors, longrope)
    tokenizer = None
    if "tokenizer.ggml.model" in file.metadata:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    weights = weights_from_gguf(config, file)
    return config, Decoder.from_weights(config, weights, dtype, mesh, weight_dtype), tokenizer
