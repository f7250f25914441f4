"""How the parameters of a decoder lie: matrices side by side, in shares of several devices.

A decoder keeps some matrices of a checkpoint fused in one: one wide product runs faster than some
narrow ones (8% of a step of SmolLM2 on a CPU). Spread over n devices, a fused parameter holds the
first n-th of each of its parts, then the second of each, and so on: to cut it into n equal pieces
gives every device its part of everything. Where there are fewer KV heads than devices, heads are
repeated, so that each device has the one that its queries need.

Matrices may be kept as int8, with one scale for each output channel in a parameter of its own
beside them (`qkv` and `qkv_scale`). What is summed over lies within a channel, so that a product is
scaled afterwards, and so is each device's share of a sum.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array

from sinkjax.mesh import MODEL, spec_of
from sinkjax.models.config import Config

_FUSED = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "qkv_scale": ("q_scale", "k_scale", "v_scale"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
    "gate_up_scale": ("gate_scale", "up_scale"),
}
# The matrices that may be kept as int8, and the axis that a product sums over.
SUMMED = {name: -2 for name in ("qkv", "out", "gate_up", "up", "down")} | {"embed": -1, "head": -1}
WEIGHT_DTYPES = (None, "int8")

_BY_HEAD = {f"{part}{kind}" for part in "qkv" for kind in ("", "_bias", "_scale")}
_BY_HEAD |= {"out", "sink_logits"}


def check_shards(config: Config, shards: int) -> None:
    """Raises ValueError where a model can't be spread over so many devices."""
    widths = {"heads": config.heads, "intermediate_size": config.intermediate_size}
    if config.experts is not None:
        widths["the experts' intermediate_size"] = config.experts.intermediate_size
    wrong = [f"{name} {n}" for name, n in widths.items() if n % shards]
    if config.kv_heads % shards and shards % config.kv_heads:
        wrong.append(f"kv_heads {config.kv_heads}")
    if wrong:
        raise ValueError(
            f"this model does not divide over {shards} devices of the mesh axis {MODEL!r}: "
            f"{', '.join(wrong)}. Take a number of devices that divides them (of KV heads there "
            "may be fewer, if they divide it)"
        )


def grouped(heads: Sequence[bool], shards: int) -> np.ndarray:
    """The order of KV heads in which those of a kind lie side by side, equally many on each
    device; within a kind, as they were.

    Raises:
        ValueError: there are not equally many for each device.
    """
    kinds = np.flatnonzero(heads), np.flatnonzero(~np.asarray(heads))
    if any(len(kind) % shards for kind in kinds):
        raise ValueError(
            f"{len(kinds[0])} retrieval and {len(kinds[1])} streaming heads of a layer do not "
            f"divide over {shards} devices: choose a pattern with a multiple of {shards} of both "
            "in each layer, or a mesh of data alone"
        )
    return np.concatenate(
        [
            part
            for device in zip(*(np.split(k, shards) for k in kinds), strict=True)
            for part in device
        ]
    )


def heads_in(order: np.ndarray, name: str, part: Any, kv_heads: int, axis: int) -> Any:
    """A part of a parameter with its KV heads, and their queries, along an axis in this order."""
    if name.rpartition(".")[2] not in _BY_HEAD:
        return part
    axis %= part.ndim
    heads = part.reshape(*part.shape[:axis], kv_heads, -1, *part.shape[axis + 1 :])
    return jnp.take(heads, order, axis=axis).reshape(part.shape)


def check_weight_dtype(weight_dtype: str | None) -> None:
    """Raises ValueError where matrices can't be kept so."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype must be one of {WEIGHT_DTYPES}, got {weight_dtype!r}")


def in_8_bits(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8, and float32 scales over an axis; those of rows that are not finite are not
    finite."""
    x = np.asarray(x, np.float32)
    scale = np.maximum(x.max(axis), -x.min(axis)) / np.float32(127)
    divisor = np.expand_dims(np.where(scale > 0, scale, 1), axis)
    with np.errstate(invalid="ignore"):
        return np.rint(x / divisor).astype(np.int8), scale


def row_major(sharding: Sharding, axes: int) -> Format:
    """Where an array lies, with its axes in their order. A TPU else takes the order that pads
    least, such as the reverse where a width is no multiple of 128, and then copies the weights back
    to this one at every step."""
    return Format(Layout(tuple(range(axes))), sharding)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a decoder.

    Attributes:
        last: its own name, without those of the modules that it is in.
        names: of the parts that it is made of, as a checkpoint names them.
        shape, dtype: of all of it.
        axes: the name of each axis.
        pieces: into how many each part is cut: as many as there are devices, or fewer KV heads.
        shards: the number of devices that it is laid out for.
        widths: of one device's part of each part, along the last axis.
    """

    last: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    pieces: tuple[int, ...]
    shards: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, config: Config, shards: int, path: tuple, leaf: Any) -> "Parameter":
        *parents, last = map(str, path)
        if last in ("weight", "bias"):  # of a norm
            names = [".".join(parents) + ("_bias" if last == "bias" else "")]
        else:
            names = [".".join([*parents, part]) for part in _FUSED.get(last, (last,))]
        pieces, local = [shards] * len(names), leaf.shape[-1] // shards
        widths = [local // len(names)] * len(names)
        if len(names) == 3:
            kv = max(1, config.kv_heads // shards) * config.head_dim
            pieces[1:] = [min(shards, config.kv_heads)] * 2
            widths = [local - 2 * kv, kv, kv]
        return cls(
            last,
            tuple(names),
            leaf.shape,
            leaf.dtype,
            leaf.axes,
            tuple(pieces),
            shards,
            tuple(widths),
        )

    @property
    def spread(self) -> int | None:
        """The axis that is spread over devices, if one is."""
        spec = spec_of(self.axes)
        return next((axis for axis, name in enumerate(spec) if name == MODEL), None)

    def part_shape(self, part: int) -> tuple[int, ...]:
        """The shape of a part as a checkpoint has it."""
        if len(self.names) == 1:
            return self.shape
        return (*self.shape[:-1], self.widths[part] * self.pieces[part])

    def share(self, part: int, x: np.ndarray, shard: int) -> np.ndarray:
        """What device number `shard` has of a part."""
        if self.spread is None:
            return x
        width = x.shape[self.spread] // self.pieces[part]
        piece = shard * self.pieces[part] // self.shards
        cut = [slice(None)] * x.ndim
        cut[self.spread] = slice(piece * width, (piece + 1) * width)
        return x[tuple(cut)]

    def parts_of(self, leaf: Array) -> dict[str, Array]:
        """The parts by name, from all of the parameter."""
        if len(self.names) == 1:
            return {self.names[0]: leaf}
        front = leaf.shape[:-1]
        by_shard = leaf.reshape(*front, self.shards, -1)
        cuts = np.cumsum(self.widths)[:-1]
        parts = jnp.split(by_shard, cuts, axis=-1)
        return {
            name: part[..., :: self.shards // pieces, :].reshape(*front, -1)
            for name, part, pieces in zip(self.names, parts, self.pieces, strict=True)
        }

    def fused(self, parts: Mapping[str, Array]) -> Array:
        """All of the parameter, from its parts. KV heads are not repeated."""
        if len(self.names) == 1:
            return parts[self.names[0]]
        front = self.shape[:-1]
        by_shard = [parts[name].reshape(*front, self.shards, -1) for name in self.names]
        return jnp.concatenate(by_shard, axis=-1).reshape(self.shape)

    def reordered(self, leaf: Any, order: np.ndarray, config: Config) -> Array:
        """The parameter with its KV heads, and their queries, in this order; in its place."""
        axis = self.axes.index("heads")

        def f(leaf):
            parts = self.parts_of(leaf)
            moved = {n: heads_in(order, n, x, config.kv_heads, axis) for n, x in parts.items()}
            return self.fused(moved)

        return jax.jit(f, out_shardings=leaf.format, donate_argnums=0)(leaf)

    def placed(
        self, weights: Mapping[str, Any], mesh: Mesh | None, scale: "Parameter | None" = None
    ) -> tuple[list[Array], list[str]]:
        """The parameter on its devices, and what is wrong with it. Parts are asked for one by
        one, and each device's share is put on it at once.

        A device that is not of this process gets nothing from here.

        Args:
            weights: see `Decoder.from_weights`.
            scale: that of this matrix, where it is kept as int8: placed too.
        """
        if mesh is None:
            places: dict[Any, int] = {jax.devices()[0]: 0}
        else:
            shards = np.broadcast_to(
                np.arange(mesh.shape[MODEL]).reshape(
                    [-1 if name == MODEL else 1 for name in mesh.axis_names]
                ),
                mesh.devices.shape,
            )
            places = {
                device: int(shard)
                for device, shard in zip(mesh.devices.flat, shards.flat, strict=True)
                if device.process_index == jax.process_index()
            }
        wrong = []
        made = [self] if scale is None else [self, scale]
        shares: list[dict[int, list[np.ndarray]]]
        shares = [{shard: [] for shard in places.values()} for _ in made]
        for part, name in enumerate(self.names):
            x = np.asarray(weights[name])
            if x.shape != self.part_shape(part):
                wrong.append(f"misshapen: {name} is {x.shape}, expected {self.part_shape(part)}")
                continue
            kept = [x] if scale is None else in_8_bits(x, SUMMED[self.last])
            for parameter, held_by, y in zip(made, shares, kept, strict=True):
                for shard, held in held_by.items():
                    # A copy, not a view of the file: the file may change or go.
                    held.append(np.array(parameter.share(part, y, shard), dtype=parameter.dtype))
            if not all(np.isfinite(held[-1]).all() for held in shares[-1].values()):
                wrong.append(f"not finite: {name} holds NaN or infinity")
            del x, kept, y
        if wrong:
            return [], wrong
        return [p._put(held, places, mesh) for p, held in zip(made, shares, strict=True)], []

    def _put(
        self, shares: dict[int, list[np.ndarray]], places: dict[Any, int], mesh: Mesh | None
    ) -> Array:
        """The parameter, from each device's shares of its parts."""
        arrays = []
        for device, shard in places.items():
            held = shares[shard]
            whole = held[0] if len(held) == 1 else np.concatenate(held, axis=-1)
            where = row_major(SingleDeviceSharding(device), whole.ndim)
            arrays.append(jax.device_put(whole, where))
        if mesh is None:
            return arrays[0]
        sharding = NamedSharding(mesh, spec_of(self.axes))
        return jax.make_array_from_single_device_arrays(self.shape, sharding, arrays)
