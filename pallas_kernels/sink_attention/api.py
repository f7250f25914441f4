"""The public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.checks import check_heads, check_options, check_ring
from pallas_kernels.flash import backends
from pallas_kernels.flash.call import Inputs
from pallas_kernels.flash.rule import EMPTY, Rule, ring_ticks, starts_of
from pallas_kernels.flash.vjp import merged
from pallas_kernels.ring import Ring

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


def sink_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K Hkv D"],
    v: Float[Array, "B K Hkv D"],
    *,
    sinks: int = 0,
    window: int | None = None,
    q_sinks: Float[Array, "B T H D"] | None = None,
    ring: Ring | None = None,
    ticks: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    block_sizes: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """Softmax attention of a chunk of T tokens a row: query t sees key i where i ≤ t and
    (i < S or t − i < W). The cost grows as T · (S + W).

    Differentiable in `q`, `k`, `v`, `q_sinks`, `sink_logits` and the ring; with a quantised ring
    not at all.

    Args:
        q, k, v: of the new tokens, rotated already where the model rotates. H is a multiple of
            Hkv; consecutive heads share a KV head (GQA). Of K > T keys the queries' own are the
            last T.
        sinks: S ≥ 0, the first tokens of each sequence, which every later one sees.
        window: W ≥ 1; None: plain causal attention.
        q_sinks: the queries rotated for the sinks, where that is another angle (StreamingLLM's
            positions inside the cache, arXiv 2309.17453, section 3.2); None: `q` serves all keys.
        ring: tokens that came before the first key; it is read, not written. Of any dtype: blocks
            of it that something sees are made into the dtype of `q`, one at a time.
        ticks: the tokens of each row that came before the first key, folded or not (see `Ring`;
            from S + W on, t may be given as S + W + (t − S) mod W); None: none did. Where it is
            negative, so many keys are none at all, and no query sees them.
        segment_ids: several sequences packed into a row, as runs of equal ids. Each is attended to
            as if it were alone, sinks of its own and all. Not with a ring.
        sink_logits: a learned logit per head that takes its part of the softmax and gives nothing
            (gpt-oss). Zeros: softmax-off-by-one (Miller 2023).
        alibi_slopes: ALiBi: slope times distance is subtracted from the score; sinks count as
            lying right before the window (StreamingLLM). No gradient flows to it.
        soft_cap: scores become cap · tanh(score / cap) (Gemma 2).
        scale: of the scores; None: 1/√D.
        return_lse: return the log-sum-exp of the scores as well, learned logit included.
        backend: `"tpu"`, `"gpu"`, `"xla"` or `"reference"`; None: the kernel of this platform
            where it serves the call, else `"xla"`.
        block_sizes: queries and keys that a kernel takes at a time; None: from its table.
        interpret: Pallas' interpret parameters, to run a kernel without its hardware.

    Returns:
        `[B, T, H, D]`, dtype of `q`, softmax and sums in float32; and `[B, T, H]`, float32. A
        query that sees nothing gets zeros and −inf.

    Raises:
        ValueError: shapes that do not fit, W < 1, S < 0, a named backend that can't serve, or
            gradients asked for with a quantised ring.
    """
    check_heads("sink_attention", q, k, v, q_sinks)
    check_options("sink_attention", q, sinks, window, sink_logits, alibi_slopes)
    B, T, H, D = q.shape
    K = k.shape[1]
    if T > K:
        raise ValueError(f"sink_attention: {T} queries need as many keys at least, got {K}")
    if ring is not None and ticks is None:
        raise ValueError("sink_attention: a ring needs ticks, the tokens that came before")
    rule = Rule(sinks, window, D**-0.5 if scale is None else scale, soft_cap)
    if alibi_slopes is not None:
        alibi_slopes = jax.lax.stop_gradient(alibi_slopes.astype(jnp.float32))
    if segment_ids is not None and (segment_ids.shape != (B, T) or K != T):
        raise ValueError(
            f"sink_attention: segment_ids {segment_ids.shape} do not fit [B, T] = {(B, T)} of "
            f"{K} keys"
        )
    row = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (B, K))
    new_ticks = row if ticks is None else jnp.maximum(row + ticks[:, None], EMPTY)
    q_ticks = new_ticks[:, K - T :]
    q_starts = jnp.zeros_like(q_ticks) if segment_ids is None else starts_of(segment_ids)

    def part(keys: Ring, k_ticks: Array, *, own: bool) -> tuple[Array, Array]:
        queries = [None if a is None else _by_head(a) for a in (q, q_sinks)]
        x = Inputs(queries[0], keys.k, keys.v, queries[1], keys.k_scale, keys.v_scale)
        return backends.attention(
            "sink_attention",
            x,
            rule=rule,
            places=(q_ticks, k_ticks, q_starts, alibi_slopes),
            own=own,
            packed=segment_ids is not None,
            out_dtype=q.dtype if ring is None and sink_logits is None else jnp.float32,
            backend=backend,
            block_sizes=block_sizes,
            interpret=interpret,
        )

    parts = [part(Ring(_by_head(k), _by_head(v)), new_ticks, own=True)]
    if ring is not None:
        check_ring("sink_attention", ring, ticks, B, k.shape[2], D, sinks, window)
        if segment_ids is not None:
            raise ValueError("sink_attention: segment_ids with a ring: a ring holds one sequence")
        held = ring_ticks(ticks, sinks, window)
        parts.append(part(ring, held, own=False))
    if sink_logits is not None:
        logit = jnp.broadcast_to(sink_logits.astype(jnp.float32)[:, None], (B, H, T))
        parts.append((jnp.zeros((B, H, T, D)), logit))
    out, lse = merged(parts)
    out = out.astype(q.dtype).swapaxes(1, 2)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


def _by_head(x: Array) -> Array:
    return x.swapaxes(1, 2)
