"""The pairs of a query block and a key block that a kernel visits, as a list that its grid follows.

A map of blocks in two dimensions would make the grid as long as its longest row. A list is as long
as what is listed: short for a causal triangle, and for the key block of the sinks, which every
query block reads while no other is read by more than a window's worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash.call import Call, Places
from pallas_kernels.flash.rule import EMPTY, Rule, blocked

if TYPE_CHECKING:
    from jaxtyping import Int32

# A pair is one int32: what it holds and where it stands in its run in the lowest bits, then two
# block indices. A run is the pairs of one outer block, one after the other.
NEAR, FAR = 1, 2  # keys that are no sinks, sinks: may be visible
FIRST, LAST = 4, 8  # of a run
STATE_BITS, INNER_BITS, OUTER_BITS = 4, 14, 13


class Bound(NamedTuple):
    """Pairs of a query block and a key block in one list, at most. Hashable.

    Attributes:
        near: of which a query may see keys that are no sinks.
        far: of which queries see sinks alone.
        idle: query blocks that may see nothing.
    """

    near: int
    far: int = 0
    idle: int = 0


def bound(
    rule: Rule, queries: int, keys: int, block_q: int, block_k: int, *, own: bool, packed: bool
) -> Bound:
    """How many pairs `block_map` lists at most.

    Args:
        own: the keys are the chunk's own and those right before it, their ticks in order; else
            they are a ring's.
        packed: sequences begin anywhere, not only with the first key.
    """
    count_k = -(-keys // block_k)
    before = keys - queries
    near = far = idle = 0
    for first in range(0, queries, block_q):
        end = min(first + block_q, queries)
        if own:
            reach = before + first if rule.window is None else rule.window - 1
            low = max(0, before + first - reach) // block_k
            here = -(-(before + end) // block_k) - low
            elsewhere = low
        else:
            here = _blocks_in_ring(rule, keys, block_k, first)
            elsewhere = count_k - here
        sinks = (rule.sinks + 2 * block_k - 2 if packed else rule.sinks + block_k - 1) // block_k
        sinks = min(sinks, elsewhere) if rule.sinks else 0
        near, far, idle = near + here, far + sinks, idle + (here + sinks == 0)
    return Bound(near, far, idle)


def _blocks_in_ring(rule: Rule, capacity: int, block: int, age: int) -> int:
    """Blocks with window tokens that a query sees which comes `age` tokens after the newest one,
    wherever the ring begins."""
    assert rule.window is not None
    seen = rule.window - 1 - age
    if seen <= 0:
        return 0
    # The tokens are one run of slots, or two: one that ends with the ring, one that begins after
    # the sinks. Each piece touches a block more than its length needs, at most.
    blank = -capacity % block + rule.sinks % block
    return min(-(-capacity // block), (seen + blank - 2) // block + 2)


def states(call: Call, places: Places, needs_sinks: bool) -> Int32[Array, "Bb Hb Nq Nk"]:
    """Of each pair, NEAR and FAR as they hold; 0 where there is nothing to see.

    Args:
        needs_sinks: whether FAR is wanted in pairs that are NEAR as well.
    """
    rule = call.rule
    if not rule.sinks:
        return places.blocks.astype(jnp.int32) * NEAR
    q_low = blocked(places.q_ticks, call.block_q, jnp.min)[:, :, None]
    start_low = blocked(places.q_starts, call.block_q, jnp.min)[:, :, None]
    start_high = blocked(places.q_starts, call.block_q, jnp.max)[:, :, None]
    held = jnp.where(places.k_ticks == EMPTY, jnp.iinfo(jnp.int32).max, places.k_ticks)
    k_low = blocked(held, call.block_k, jnp.min)[:, None]
    k_high = blocked(places.k_ticks, call.block_k, jnp.max)[:, None]
    near = k_high - start_low >= rule.sinks
    if rule.window is not None:
        near &= q_low - k_high < rule.window
    far = (k_low < start_high + rule.sinks) & (k_high >= start_low)
    if not needs_sinks:
        far &= ~near
    state = jnp.where(near, NEAR, 0) + jnp.where(far, FAR, 0)
    return jnp.where(places.blocks, state[:, None], 0)


def pair_list(state: Int32[Array, "L No Ni"], size: int) -> Int32[Array, "L size"]:
    """The pairs that are not 0, ordered by outer block, then inner. An outer block without any has
    one, of state 0, so that its result is written too. The last pair, its state 0, fills up."""
    L, outers, inners = state.shape
    idle = jnp.all(state == 0, axis=2)
    taken = (state != 0).at[:, :, 0].max(idle)
    index = jnp.arange(outers * inners, dtype=jnp.int32)
    none = jnp.iinfo(jnp.int32).max
    key = jnp.where(taken.reshape(L, -1), index << 2 | state.reshape(L, -1), none)
    key = jnp.sort(key, axis=1)[:, :size]
    key = jnp.pad(key, ((0, 0), (0, size - key.shape[1])), constant_values=none)

    valid = key != none
    last = jnp.sum(valid, axis=1, keepdims=True) - 1
    at = jnp.where(valid, key >> 2, jnp.take_along_axis(key >> 2, last, axis=1))
    outer, inner = at // inners, at % inners
    run = jnp.where(valid, outer, -1)  # a run ends where another begins or the list does
    edge = jnp.full((L, 1), -2)
    first = run != jnp.concatenate([edge, run[:, :-1]], axis=1)
    final = run != jnp.concatenate([run[:, 1:], edge], axis=1)
    bits = (key & 3) | jnp.where(first, FIRST, 0) | jnp.where(final, LAST, 0)
    word = outer << (INNER_BITS + STATE_BITS) | inner << STATE_BITS | jnp.where(valid, bits, 0)
    return word.astype(jnp.int32)


def outer_of(word: Array) -> Array:
    return word >> (INNER_BITS + STATE_BITS)


def inner_of(word: Array) -> Array:
    return (word >> STATE_BITS) & ((1 << INNER_BITS) - 1)
