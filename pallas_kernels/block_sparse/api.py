"""The public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.backends import choose
from pallas_kernels.checks import check_heads
from pallas_kernels.flash.backends import refusals
from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.rule import Rule
from pallas_kernels.flash.vjp import attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K Hkv D"],
    v: Float[Array, "B K Hkv D"],
    blocks: Int32[Array, "Bb Hb Nq N"],
    *,
    block_sizes: tuple[int, int],
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    interpret: Any = None,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """Causal attention in which each block of queries reads the key blocks listed for it.

    The last query stands at the last key: query t sees key i where i ≤ t + K − T and the block of
    i is listed for the block of t. Differentiable in `q`, `k` and `v`.

    Args:
        q, k, v: rotated already where the model rotates. H is a multiple of Hkv.
        blocks: for each block of queries the indices of key blocks to read, in any order; −1 fills
            up. One that is listed twice counts once. Bb is 1 or B; Hb is 1, Hkv or H.
        block_sizes: queries and keys in a block; the last block of either may be shorter.
        scale: of the scores; None: 1/√D.
        soft_cap: scores become cap · tanh(score / cap).
        return_lse: return the log-sum-exp of the scores as well.
        backend: `"tpu"`, `"gpu"`, `"xla"` or `"reference"`; None: the kernel of this platform
            where it serves the call, else `"xla"`.
        interpret: Pallas' interpret parameters, to run a kernel without its hardware.

    Returns:
        `[B, T, H, D]`, dtype of `q`; and `[B, T, H]`, float32. A query that sees nothing gets
        zeros and −inf.

    Raises:
        ValueError: shapes that do not fit, more queries than keys, or a named backend that can't
            serve.
    """
    check_heads("block_sparse_attention", q, k, v, None)
    B, T, H, D = q.shape
    K, Hkv = k.shape[1:3]
    block_q, block_k = block_sizes
    if T > K:
        raise ValueError(f"block_sparse_attention: {T} queries, but only {K} keys")
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_sparse_attention: block_sizes must be ≥ 1, got {block_sizes}")
    count_q, count_k = -(-T // block_q), -(-K // block_k)
    fits = (
        blocks.ndim == 4
        and blocks.shape[0] in (1, B)
        and blocks.shape[1] in (1, Hkv, H)
        and blocks.shape[2] == count_q
    )
    if not fits:
        raise ValueError(
            f"block_sparse_attention: blocks {blocks.shape} must be [1 or B, 1 or Hkv or H, Nq, N] "
            f"with B, Hkv, H, Nq = {B}, {Hkv}, {H}, {count_q}"
        )
    listed = jnp.any(blocks[..., None] == jnp.arange(count_k), axis=-2)
    k_ticks = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (B, K))
    q_ticks = k_ticks[:, K - T :]
    # What lies wholly after a block of queries is not worth reading.
    last = jnp.minimum(jnp.arange(1, count_q + 1) * block_q, T) - 1 + K - T
    listed &= jnp.arange(count_k) * block_k <= last[:, None]
    places = Places(q_ticks, k_ticks, jnp.zeros_like(q_ticks), None, listed)
    rule = Rule(0, None, D**-0.5 if scale is None else scale, soft_cap)
    call = Call(
        rule,
        block_q,
        block_k,
        min(blocks.shape[3], count_k),
        q.dtype,
        interpret,
        lists=(blocks.shape[0], blocks.shape[1]),
    )
    x = Inputs(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), None)
    name = choose(
        "block_sparse_attention",
        backend,
        refusals(x, lambda _: call),
        default="xla",
        array=x.q,
        interpret=interpret,
    )
    out, lse = attention(name, call, x, places)
    out = out.swapaxes(1, 2)
    return (out, lse.swapaxes(1, 2)) if return_lse else out
