"""The op in plain jax.numpy: its definition, and what runs where no kernel does."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash.rule import EMPTY, distance, is_sink, ring_ticks, slot_of, visible
from pallas_kernels.ring import Ring, write
from pallas_kernels.ring_decode.call import Call


def decode(
    call: Call,
    q: Array,
    q_sinks: Array | None,
    new: Ring,
    ring: Ring,
    ticks: Array,
    slopes: Array | None,
) -> tuple[Array, Array, Ring]:
    """Attention of the new tokens, and the ring with them in it.

    Args:
        q, q_sinks: `[B, H, T, D]`.
        new: the new tokens as the ring holds them, `[B, Hkv, T, D]`, scales `[B, Hkv, T]`.
        ring, ticks: as they were before.
        slopes: ALiBi's, `[H]`, float32.

    Returns:
        The output `[B, H, T, D]` and the log-sum-exp `[B, H, T]`, float32, and the ring.
    """
    rule = call.rule
    T = q.shape[2]
    q_ticks = ticks[:, None] + jnp.arange(T, dtype=jnp.int32)
    slots = slot_of(q_ticks, rule.sinks, rule.window)
    after = Ring(
        *(None if old is None else write(old, x, slots) for old, x in zip(ring, new, strict=True))
    )
    if T == 1:
        # The token that leaves is out of the window of the one that takes its slot: the ring
        # alone, read once, is what the query sees.
        held = ring_ticks(ticks + 1, rule.sinks, rule.window)
        sources = [(after, held)]
    else:
        sources = [(ring, ring_ticks(ticks, rule.sinks, rule.window)), (new, q_ticks)]
    scores = [_scores(call, q, q_sinks, s, q_ticks, held, slopes) for s, held in sources]
    peak = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0)[..., None]
    weights = [jnp.exp(s - peak) for s in scores]  # a token sees itself: no peak is −inf
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    values = [_values(w, s) for w, (s, _) in zip(weights, sources, strict=True)]
    out = jnp.asarray(sum(values)) / total
    lse = (peak + jnp.log(total))[..., 0]
    B, H, _, D = q.shape
    return out.reshape(B, H, T, D), lse.reshape(B, H, T), after


def _scores(call, q, q_sinks, source: Ring, q_ticks, k_ticks, slopes) -> Array:
    """`[B, Hkv, G, T, C]`, −inf where a key is hidden."""
    rule, S = call.rule, call.rule.sinks
    Hkv = source.k.shape[1]
    scores = _dot(_grouped(q, Hkv), source.k)
    at = (q_ticks[:, :, None], k_ticks[:, None], jnp.zeros_like(q_ticks)[:, :, None])
    if q_sinks is not None and S:
        # Sinks lie first, in a ring and, while it is young, among the new tokens.
        first = is_sink(rule, at[1][..., :S], at[2])[:, None, None]
        far = _dot(_grouped(q_sinks, Hkv), source.k[:, :, :S])
        scores = scores.at[..., :S].set(jnp.where(first, far, scores[..., :S]))
    scores = scores * rule.scale
    if source.k_scale is not None:
        scores = scores * source.k_scale[:, :, None, None]
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    if slopes is not None:
        far = distance(rule, *at)[:, None, None]
        scores -= slopes.reshape(Hkv, -1, 1, 1) * far
    seen = visible(rule, *at) & (k_ticks != EMPTY)[:, None]
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _grouped(q: Array, kv_heads: int) -> Array:
    B, H, T, D = q.shape
    return q.reshape(B, kv_heads, H // kv_heads, T, D)


# One query a row is a matrix-vector product, bound by the reading of the cache. As a dot, XLA's CPU
# backend first copies the keys and values of every layer to the layout that it likes (25 ms of a
# 45 ms step of SmolLM2); as multiply-and-sum it reads them once where they lie.


def _dot(q: Array, k: Array) -> Array:
    if q.shape[3] == 1:
        return jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[:, :, None], axis=-1)[
            ..., None, :
        ]
    return jnp.einsum("bkgtd,bkcd->bkgtc", q, k.astype(q.dtype), preferred_element_type=jnp.float32)


def _values(weights: Array, source: Ring) -> Array:
    if source.v_scale is not None:
        weights = weights * source.v_scale[:, :, None, None]
    v = source.v
    if weights.shape[3] == 1:
        return jnp.sum(weights[..., 0, :, None] * v.astype(jnp.float32)[:, :, None], axis=-2)[
            ..., None, :
        ]
    kind = jnp.float32 if source.v_scale is not None else v.dtype
    return jnp.einsum(
        "bkgtc,bkcd->bkgtd",
        weights.astype(kind),
        v.astype(kind),
        preferred_element_type=jnp.float32,
    )
