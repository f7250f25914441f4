"""Mosaic TPU: a call whose lists scalar memory can't hold at once, in parts over the heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.pairs import Bound

LIST_ROOM = 512 * 1024  # bytes of scalar memory for the lists


def list_bytes(call: Call, x: Inputs) -> int:
    """Of all lists of a call, four for a pair of blocks."""
    rows, lists = call.lists or (x.q.shape[0], 1)
    count_q = -(-x.q.shape[2] // call.block_q)
    count_k = -(-x.k.shape[2] // call.block_k)
    bound = call.bound or Bound(count_q * call.most)
    return 4 * rows * lists * (bound.near + bound.far + max(count_q, count_k))


def count(call: Call, x: Inputs) -> int | None:
    """In how many parts the lists fit; None: in no number."""
    size, kv_heads = list_bytes(call, x), x.k.shape[1]
    most = 1 if call.lists is None or call.lists[1] == 1 else kv_heads
    fits = (n for n in range(1, most + 1) if kv_heads % n == 0 and size <= n * LIST_ROOM)
    return next(fits, None)


def in_parts(f: Callable, call: Call, x: Inputs, places: Places, *rows: Array) -> Any:
    """`f(call, x, places, *rows)`, whose arrays all have heads on axis 1, over some heads at a
    time."""
    parts = count(call, x)
    if parts == 1:
        return f(call, x, places, *rows)

    def part(i: int) -> Any:
        def cut(a: Array, axis: int = 1) -> Array:
            return jnp.split(a, parts, axis)[i]

        slopes = None if places.slopes is None else cut(places.slopes, 0)
        here = places._replace(blocks=cut(places.blocks), slopes=slopes)
        return f(call, jax.tree.map(cut, x), here, *map(cut, rows))

    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *map(part, range(parts)))
