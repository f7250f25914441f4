"""Which key a query sees: sinks, a window, a causal chunk; and what that means for whole blocks.

Tokens are known by their *tick*, the count of tokens before them. The tick of a slot of a ring
follows from the ring's clock alone, so a chunk and a ring differ in their key ticks and in nothing
else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32

EMPTY = -1  # the tick of a slot that holds nothing


class Rule(NamedTuple):
    """What holds for a whole call. Hashable.

    Attributes:
        sinks: S, first tokens that every later one sees.
        window: W, tokens back that a query sees, itself among them; None: all.
        scale: of the scores.
        soft_cap: scores become cap · tanh(score / cap), after scaling (Gemma 2); None: they stay.
    """

    sinks: int
    window: int | None
    scale: float
    soft_cap: float | None = None


def is_sink(rule: Rule, k_ticks: Array, q_starts: Array) -> Array:
    """A token is a sink where fewer than S tokens of its sequence came before it."""
    return k_ticks - q_starts < rule.sinks


def visible(rule: Rule, q_ticks: Array, k_ticks: Array, q_starts: Array) -> Array:
    """Whether a query sees a key: its own sequence's, not later, and a sink or in the window.

    Args:
        q_ticks, k_ticks: int32, of shapes that broadcast.
        q_starts: int32, like `q_ticks`: the tick at which the query's sequence begins (≥ 0).
    """
    seen = (k_ticks >= q_starts) & (k_ticks <= q_ticks)
    if rule.window is None:
        return seen
    return seen & (is_sink(rule, k_ticks, q_starts) | (q_ticks - k_ticks < rule.window))


def distance(rule: Rule, q_ticks: Array, k_ticks: Array, q_starts: Array) -> Array:
    """Tokens between query and key as ALiBi counts them: a sink seems to lie right before the
    window (StreamingLLM, section 3.2, positions in the cache)."""
    if rule.window is None or not rule.sinks:
        return q_ticks - k_ticks
    place = jnp.minimum(q_ticks - q_starts, rule.sinks + rule.window - 1)
    at_sink = place - (k_ticks - q_starts)
    return jnp.where(is_sink(rule, k_ticks, q_starts), at_sink, q_ticks - k_ticks)


def ring_ticks(ticks: Int32[Array, " B"], sinks: int, window: int) -> Int32[Array, "B C"]:
    """The tick of the token in each slot of a ring, or `EMPTY`.

    Args:
        ticks: tokens written. May be folded: t, or S + W + (t − S) mod W from S + W on.
    """
    last = ticks[:, None] - 1
    newest = last - (last - sinks - jnp.arange(window, dtype=jnp.int32)) % window
    first = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32), (ticks.shape[0], sinks))
    held = jnp.concatenate(
        [jnp.where(first <= last, first, EMPTY), jnp.where(newest >= sinks, newest, EMPTY)], axis=1
    )
    return held


def slot_of(ticks: Array, sinks: int, window: int) -> Array:
    """Where the token of this tick lies: its own slot while t < S, else S + (t − S) mod W."""
    return jnp.where(ticks < sinks, ticks, sinks + (ticks - sinks) % window)


def starts_of(segment_ids: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """For each token, the index at which its segment begins. Segments are runs of equal ids."""
    row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.concatenate(
        [
            jnp.ones_like(segment_ids[:, :1], dtype=bool),
            segment_ids[:, 1:] != segment_ids[:, :-1],
        ],
        axis=1,
    )
    return jnp.maximum.accumulate(jnp.where(begins, row, 0), axis=1)


def block_map(
    rule: Rule,
    q_ticks: Int32[Array, "B T"],
    k_ticks: Int32[Array, "B K"],
    q_starts: Int32[Array, "B T"],
    block_q: int,
    block_k: int,
) -> Bool[Array, "B Nq Nk"]:
    """Whether any query of a block may see any key of a block. Never false where one does; true
    for a few blocks of a ring where none does (that in which the ring begins and ends)."""
    q_low, q_high = blocked(q_ticks, block_q, jnp.min), blocked(q_ticks, block_q, jnp.max)
    start = blocked(q_starts, block_q, jnp.min)[:, :, None]
    held = jnp.where(k_ticks == EMPTY, jnp.iinfo(jnp.int32).max, k_ticks)
    k_low = blocked(held, block_k, jnp.min)[:, None]
    k_high = blocked(k_ticks, block_k, jnp.max)[:, None]
    seen = (k_low <= q_high[:, :, None]) & (k_high >= start)
    if rule.window is None:
        return seen
    in_window = q_low[:, :, None] - k_high < rule.window
    if not rule.sinks:
        return seen & in_window
    # Of the sequences in a block of queries only the first began before it; the sinks of the
    # others are inside the block, and so in its window.
    has_sink = (k_low < start + rule.sinks) & (k_high >= start)
    return seen & (in_window | has_sink)


def blocked(x: Array, block: int, reduce) -> Array:
    """Reduces the last axis block by block; the last block may be shorter."""
    pad = -x.shape[-1] % block
    x = jnp.concatenate([x, jnp.repeat(x[..., -1:], pad, axis=-1)], axis=-1)
    return reduce(x.reshape(*x.shape[:-1], -1, block), axis=-1)


def most_blocks(rule: Rule, queries: int, keys: int, block_q: int, block_k: int) -> int:
    """The most key blocks that `block_map` can list for one block of queries of one chunk whose
    keys are its own (ticks in order): sinks, window, diagonal."""
    total = -(-keys // block_k)
    if rule.window is None:
        return total
    near = -(-(min(block_q, queries) + rule.window - 1) // block_k) + 1
    far = -(-rule.sinks // block_k) + 1 if rule.sinks else 0
    return min(total, near + far)
