"""A ring of keys and values in a fixed shape, in full precision or quantised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Float, Num


class Ring(NamedTuple):
    """Keys and values in C = S + W slots: token t in slot t while t < S, else S + (t − S) mod W.

    A cache that is never full is the case S = 0, W = C.

    Attributes:
        k, v: `[B, Hkv, C, D]`: bfloat16 or float32, or int8 or int4 with scales.
        k_scale, v_scale: `[B, Hkv, C]`, float32: what the integers of each token and head are
            multiplied with; None where `k` and `v` are floats.
    """

    k: Num[Array, "B Hkv C D"]
    v: Num[Array, "B Hkv C D"]
    k_scale: Float[Array, "B Hkv C"] | None = None
    v_scale: Float[Array, "B Hkv C"] | None = None


def empty_ring(
    batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: DTypeLike = jnp.bfloat16
) -> Ring:
    """A ring of zeros; with scales where `dtype` is int8 or int4.

    Raises:
        ValueError: another integer dtype, or int4 with an odd head dimension (two values share a
            byte).
    """
    dtype = jnp.dtype(dtype)
    shape = (batch, kv_heads, capacity, head_dim)
    k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return Ring(k, v)
    if dtype not in LARGEST:
        raise ValueError(f"a ring holds floats, int8 or int4, got {dtype}")
    if dtype == jnp.int4 and head_dim % 2:
        raise ValueError(f"int4 needs an even head_dim (two values share a byte), got {head_dim}")
    return Ring(k, v, jnp.zeros(shape[:3]), jnp.zeros(shape[:3]))


def bytes_of(arrays: Any) -> int:
    """What the arrays of a pytree, or of one of shapes, take; two numbers of 4 bits a byte."""
    leaves = jax.tree.leaves(arrays)
    return sum(x.size * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) for x in leaves) // 8


LARGEST = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.int4): 7}


def quantised(x: Float[Array, "... D"], dtype: DTypeLike) -> tuple[Array, Array | None]:
    """x in the dtype of a ring: cast, or symmetric integers with one scale over the last axis.

    Returns:
        `[..., D]` of `dtype`, and the scale `[...]`, float32; None for floats.
    """
    largest = LARGEST.get(jnp.dtype(dtype))
    if largest is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)

    def rounded(scale):
        whole = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
        return jnp.clip(whole, -largest, largest)

    def error(scale):
        return jnp.sum(jnp.square(rounded(scale) * scale[..., None] - x), axis=-1)

    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    # With few steps it is better to cut the largest values off than to have wide steps for all.
    narrower = [share * scale for share in (0.9, 0.8, 0.7)] if largest < 16 else []
    for other in narrower:
        scale = jnp.where(error(other) < error(scale), other, scale)
    return rounded(scale).astype(dtype), scale


def stored(k: Array, v: Array, dtype: DTypeLike) -> Ring:
    """Keys and values `[B, Hkv, T, D]` as a ring of this dtype holds them."""
    (k, k_scale), (v, v_scale) = quantised(k, dtype), quantised(v, dtype)
    return Ring(k, v, k_scale, v_scale)


def floats(ring: Ring, dtype: DTypeLike) -> Ring:
    """The ring in a dtype of floats: a copy where it is another."""
    if ring.k_scale is None:
        return Ring(ring.k.astype(dtype), ring.v.astype(dtype))
    k = ring.k.astype(jnp.float32) * ring.k_scale[..., None]
    v = ring.v.astype(jnp.float32) * ring.v_scale[..., None]
    return Ring(k.astype(dtype), v.astype(dtype))


def write(buffer: Array, new: Array, slots: Array) -> Array:
    """Puts `new[b, :, t]` into slot `slots[b, t]`, in place where the buffer is donated.

    Args:
        buffer: `[B, Hkv, C, ...]`.
        new: `[B, Hkv, T, ...]`, of the same dtype.
        slots: `[B, T]`.
    """
    # A scatter over rows of different slots is a loop, and may copy the buffer; updates do not.
    for row in range(slots.shape[0]):
        for t in range(slots.shape[1]):
            start = (row, 0, slots[row, t]) + (0,) * (buffer.ndim - 3)
            buffer = jax.lax.dynamic_update_slice(buffer, new[row : row + 1, :, t : t + 1], start)
    return buffer
