"""The public function."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.backends import choose
from pallas_kernels.checks import check_heads, check_options, check_ring
from pallas_kernels.flash.rule import Rule
from pallas_kernels.flash.vjp import merged
from pallas_kernels.ring import Ring, stored
from pallas_kernels.ring_decode.call import Call
from pallas_kernels.tuning import tuned

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


def ring_decode(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    ring: Ring,
    ticks: Int32[Array, " B"],
    *,
    sinks: int,
    window: int,
    q_sinks: Float[Array, "B T H D"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    block_size: int | None = None,
    interpret: Any = None,
) -> tuple[Any, ...]:
    """Attention of T new tokens a row, one or a few, over a ring and themselves: query t sees key
    i where i ≤ t and (i < S or t − i < W). Each slot is read once, and the new tokens are written
    into theirs, in place where the ring is donated.

    The new tokens are attended to as the ring holds them, quantised where it is. No gradients.

    Args:
        q, k, v: of the new tokens, rotated already where the model rotates.
        ring: the tokens before.
        ticks: how many there were, folded or not (see `sink_attention`).
        sinks, window: S ≥ 0 and W ≥ T.
        q_sinks, sink_logits, alibi_slopes, soft_cap, scale, return_lse: see `sink_attention`.
        backend: `"tpu"`, `"gpu"` or `"reference"` (`"xla"` is the same here); None: the kernel of
            this platform where it serves the call, else the reference.
        block_size: slots that a kernel takes at a time; None: from its table.
        interpret: Pallas' interpret parameters, to run a kernel without its hardware.

    Returns:
        `[B, T, H, D]`, dtype of `q`; the ring with the new tokens in it; and, with `return_lse`,
        the log-sum-exp `[B, T, H]`, float32.

    Raises:
        ValueError: shapes that do not fit, W < T, or a named backend that can't serve.
    """
    check_heads("ring_decode", q, k, v, q_sinks)
    check_options("ring_decode", q, sinks, window, sink_logits, alibi_slopes)
    B, T, H, D = q.shape
    check_ring("ring_decode", ring, ticks, B, k.shape[2], D, sinks, window)
    if window < T:
        raise ValueError(f"ring_decode: window {window} is shorter than the {T} new tokens")
    if block_size is None and interpret is None:
        (block_size,) = tuned("ring_decode", D, ring.k.dtype) or (None,)
    rule = Rule(sinks, window, D**-0.5 if scale is None else scale, soft_cap)
    call = Call(rule, block_size, interpret)

    new = stored(k.swapaxes(1, 2), v.swapaxes(1, 2), ring.k.dtype)
    by_head = [None if x is None else x.swapaxes(1, 2) for x in (q, q_sinks)]
    slopes = None if alibi_slopes is None else alibi_slopes.astype(jnp.float32)
    arguments = (call, *by_head, new, ring, ticks, slopes)

    def module(name: str):
        name = "reference" if name == "xla" else name  # plain JAX has one form of this op
        return importlib.import_module(f"pallas_kernels.ring_decode.{name}")

    name = choose(
        "ring_decode",
        backend,
        {
            "tpu": lambda: module("tpu").refuses(*arguments),
            "gpu": lambda: module("gpu").refuses(*arguments),
            "xla": lambda: None,
            "reference": lambda: None,
        },
        default="reference",
        array=by_head[0],
        interpret=interpret,
    )
    out, lse, ring = module(name).decode(*arguments)
    if sink_logits is not None:
        logit = jnp.broadcast_to(sink_logits.astype(jnp.float32)[:, None], (B, H, T))
        out, lse = merged([(out, lse), (jnp.zeros_like(out), logit)])
    out = out.astype(q.dtype).swapaxes(1, 2)
    return (out, ring, lse.swapaxes(1, 2)) if return_lse else (out, ring)
