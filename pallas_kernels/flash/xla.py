"""The op block by block in plain jax.numpy, on any platform: forward and backward.

Never holds more scores than those of one block of queries and one of keys, and leaves out what the
block map leaves out (over all rows and heads together). On a CPU it takes less than half of the
time of the plain reference for a chunk of a long prompt (docs/benchmarks.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.rule import distance, is_sink, visible


def forward(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    """As `reference.forward`."""
    B, H, T, D = x.q.shape
    block = _Blocks(call, x, places)

    def query_block(i, carry):
        q, q_sinks = block.queries(x.q, i), block.queries(x.q_sinks, i)

        def key_block(j, carry):
            peak, total, out = carry
            scores, _ = block.scores(i, j, q, q_sinks)
            new = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
            base = jnp.where(jnp.isfinite(new), new, 0.0)
            weights = jnp.exp(scores - base)
            shrink = jnp.exp(peak - base)
            scaled = weights
            if x.v_scale is not None:
                scaled = weights * block.keys(x.v_scale, j)[:, :, None]
            out = out * shrink + _dot("bhtk,bhkd->bhtd", scaled, block.keys(x.v, j, q.dtype))
            return new, total * shrink + jnp.sum(weights, axis=-1, keepdims=True), out

        rows = q.shape[:3]
        none = (
            jnp.full((*rows, 1), -jnp.inf),
            jnp.zeros((*rows, 1)),
            jnp.zeros((*rows, D)),
        )
        peak, total, out = block.over_keys(i, key_block, none)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
        outs, lses = carry
        return (
            block.put(outs, (out / total).astype(call.out_dtype), i),
            block.put(lses, lse, i),
        )

    out, lse = lax.fori_loop(
        0,
        block.count_q,
        query_block,
        (jnp.zeros((B, H, T, D), call.out_dtype), jnp.zeros((B, H, T, 1))),
    )
    return out, lse[..., 0]


def backward(
    call: Call, x: Inputs, places: Places, lse: Array, delta: Array, dout: Array
) -> Inputs:
    """The gradients of the inputs, in float32.

    Args:
        lse: of the forward pass, `[B, H, T]`.
        delta: `[B, H, T]`, float32: Σ_d out · dout, less the gradient of the log-sum-exp.
        dout: the gradient of the output, `[B, H, T, D]`.
    """
    block = _Blocks(call, x, places)
    # exp(score − ∞) is 0: a query that saw nothing passes nothing on.
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)

    def query_block(i, grads):
        q, q_sinks = block.queries(x.q, i), block.queries(x.q_sinks, i)
        rows = [block.queries(a, i) for a in (lse[..., None], delta[..., None], dout)]
        # Clamped blocks overlap: each query counts once.
        own = jnp.tile(block.own_queries(i), block.group)[:, None]
        rows[1:] = [jnp.where(own, a, 0.0) for a in rows[1:]]

        def key_block(j, carry):
            dq, dq_sinks, dk, dv = carry
            k, v = block.keys(x.k, j, q.dtype), block.keys(x.v, j, q.dtype)
            scores, (sink, slope) = block.scores(i, j, q, q_sinks)
            p = jnp.exp(scores - rows[0])
            ds = p * (_dot("bhtd,bhkd->bhtk", rows[2], v) - rows[1]) * slope * call.rule.scale
            dv = block.add(dv, _dot("bhtk,bhtd->bhkd", p, rows[2]), j)
            if q_sinks is None:
                dk = block.add(dk, _dot("bhtk,bhtd->bhkd", ds, q), j)
                return dq + _dot("bhtk,bhkd->bhtd", ds, k), dq_sinks, dk, dv
            far, near = jnp.where(sink, ds, 0.0), jnp.where(sink, 0.0, ds)
            dk_block = _dot("bhtk,bhtd->bhkd", near, q) + _dot("bhtk,bhtd->bhkd", far, q_sinks)
            return (
                dq + _dot("bhtk,bhkd->bhtd", near, k),
                dq_sinks + _dot("bhtk,bhkd->bhtd", far, k),
                block.add(dk, dk_block, j),
                dv,
            )

        zeros = jnp.zeros(q.shape)
        first = (zeros, None if q_sinks is None else zeros, grads.k, grads.v)
        dq, dq_sinks, dk, dv = block.over_keys(i, key_block, first)
        return Inputs(
            block.put(grads.q, dq, i),
            dk,
            dv,
            None if q_sinks is None else block.put(grads.q_sinks, dq_sinks, i),
        )

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape), x)
    return lax.fori_loop(0, block.count_q, query_block, zeros)


class _Blocks:
    """Cuts the inputs into blocks. The last block of a length that no block divides begins early
    and overlaps the one before it: of what it holds twice, only the new part counts."""

    def __init__(self, call: Call, x: Inputs, places: Places):
        self.call, self.x, self.places = call, x, places
        self.T, self.K, self.Hkv = x.q.shape[2], x.k.shape[2], x.k.shape[1]
        self.group = x.q.shape[1] // self.Hkv
        self.size_q, self.size_k = min(call.block_q, self.T), min(call.block_k, self.K)
        self.count_q = -(-self.T // call.block_q)
        listed = jnp.any(places.blocks, axis=(0, 1))
        self.order = jnp.argsort(~listed, axis=1, stable=True).astype(jnp.int32)
        self.counts = jnp.sum(listed, axis=1, dtype=jnp.int32)

    def start_q(self, i) -> Array:
        return jnp.minimum(i * self.call.block_q, self.T - self.size_q)

    def start_k(self, j) -> Array:
        return jnp.minimum(j * self.call.block_k, self.K - self.size_k)

    def queries(self, a: Array | None, i) -> Array | None:
        """Of `[B, H, T, D]`, the block's `[B, Hkv, G · block, D]`."""
        if a is None:
            return None
        a = lax.dynamic_slice_in_dim(a, self.start_q(i), self.size_q, axis=2)
        return a.reshape(a.shape[0], self.Hkv, self.group * self.size_q, a.shape[-1])

    def own_queries(self, i) -> Array:
        return self.start_q(i) + jnp.arange(self.size_q) >= i * self.call.block_q

    def put(self, whole: Array, rows: Array, i) -> Array:
        """Puts the block's own rows in, beside those of the block that it overlaps."""
        rows = rows.reshape(rows.shape[0], -1, self.size_q, rows.shape[-1])
        start = self.start_q(i)
        old = lax.dynamic_slice_in_dim(whole, start, self.size_q, axis=2)
        rows = jnp.where(self.own_queries(i)[:, None], rows, old)
        return lax.dynamic_update_slice_in_dim(whole, rows, start, axis=2)

    def keys(self, a: Array, j, dtype: DTypeLike = jnp.float32) -> Array:
        return lax.dynamic_slice_in_dim(a, self.start_k(j), self.size_k, axis=2).astype(dtype)

    def add(self, whole: Array, part: Array, j) -> Array:
        part = part + self.keys(whole, j)
        return lax.dynamic_update_slice_in_dim(whole, part, self.start_k(j), axis=2)

    def over_keys(self, i, body, init):
        return lax.fori_loop(0, self.counts[i], lambda n, c: body(self.order[i, n], c), init)

    def scores(self, i, j, q: Array, q_sinks: Array | None) -> tuple[Array, tuple[Array, Array]]:
        """The scores of a block, −inf where hidden; which are of sinks; and their slope over the
        product before the soft cap (1 without one)."""
        rule = self.call.rule
        k = self.keys(self.x.k, j, q.dtype)
        q_ticks = lax.dynamic_slice_in_dim(self.places.q_ticks, self.start_q(i), self.size_q, 1)
        starts = lax.dynamic_slice_in_dim(self.places.q_starts, self.start_q(i), self.size_q, 1)
        k_ticks = lax.dynamic_slice_in_dim(self.places.k_ticks, self.start_k(j), self.size_k, 1)
        at = (q_ticks[:, :, None], k_ticks[:, None], starts[:, :, None])
        sink = self._by_head(is_sink(rule, at[1], at[2]))
        scores = _dot("bhtd,bhkd->bhtk", q, k)
        if q_sinks is not None:
            scores = lax.cond(
                jnp.any(sink),
                lambda: jnp.where(sink, _dot("bhtd,bhkd->bhtk", q_sinks, k), scores),
                lambda: scores,
            )
        scores = scores * rule.scale
        if self.x.k_scale is not None:
            scores *= self.keys(self.x.k_scale, j)[:, :, None]
        slope = jnp.ones(())
        if rule.soft_cap is not None:
            bent = jnp.tanh(scores / rule.soft_cap)
            scores, slope = rule.soft_cap * bent, 1 - bent * bent
        if self.places.slopes is not None:
            far = self._by_head(distance(rule, *at)).astype(jnp.float32)
            slopes = jnp.repeat(self.places.slopes.reshape(self.Hkv, -1), self.size_q, axis=1)
            scores -= slopes[:, :, None] * far
        own = self.start_k(j) + jnp.arange(self.size_k) >= j * self.call.block_k
        seen = self._by_head(visible(rule, *at) & own)
        listed = self.places.blocks[:, :, i, j]
        if listed.shape[1] > 1:
            listed = jnp.repeat(listed, self.x.q.shape[1] // listed.shape[1], axis=1)
            listed = listed.reshape(listed.shape[0], self.Hkv, self.group)
            seen &= jnp.repeat(listed, self.size_q, axis=2)[..., None]
        else:
            seen &= listed[..., None, None]
        return jnp.where(seen, scores, -jnp.inf), (sink, slope)

    def _by_head(self, a: Array) -> Array:
        """`[B, block, K]`, alike for all heads, in the layout of the scores."""
        return jnp.tile(a, (1, self.group, 1))[:, None]


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)
