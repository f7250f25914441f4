"""The op in plain jax.numpy: its definition. Differentiable as it stands."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.rule import distance, is_sink, visible


def forward(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    """Softmax attention under a rule.

    Returns:
        The output `[B, H, T, D]`, and the log-sum-exp of the scores `[B, H, T]`, float32. A query
        that sees nothing gets zeros and −inf. Softmax and sums are in float32.
    """
    B, H, T, D = x.q.shape
    Hkv, K = x.k.shape[1:3]
    rule = call.rule
    k = jnp.repeat(x.k.astype(x.q.dtype), H // Hkv, axis=1)
    v = jnp.repeat(x.v.astype(x.q.dtype), H // Hkv, axis=1)
    at = (places.q_ticks[:, :, None], places.k_ticks[:, None], places.q_starts[:, :, None])

    scores = _dot("bhtd,bhkd->bhtk", x.q, k)
    if x.q_sinks is not None:
        sink = is_sink(rule, at[1], at[2])[:, None]
        scores = jnp.where(sink, _dot("bhtd,bhkd->bhtk", x.q_sinks, k), scores)
    scores = scores * rule.scale
    if x.k_scale is not None:
        scores *= jnp.repeat(x.k_scale, H // Hkv, axis=1)[:, :, None]
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    if places.slopes is not None:
        scores -= places.slopes[:, None, None] * distance(rule, *at)[:, None]
    listed = jnp.repeat(places.blocks, H // places.blocks.shape[1], axis=1)
    listed = jnp.repeat(jnp.repeat(listed, call.block_q, axis=2), call.block_k, axis=3)
    scores = jnp.where(visible(rule, *at)[:, None] & listed[:, :, :T, :K], scores, -jnp.inf)

    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    if x.v_scale is not None:
        weights *= jnp.repeat(x.v_scale, H // Hkv, axis=1)[:, :, None]
    out = _dot("bhtk,bhkd->bhtd", weights.astype(v.dtype), v) / total
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)[..., 0]
    return out.astype(call.out_dtype), lse


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
