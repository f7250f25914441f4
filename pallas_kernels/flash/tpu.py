"""Mosaic TPU: flash attention whose grid follows the list of block pairs (`pairs.py`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.flash import pairs, tpu_backward, tpu_parts
from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.pairs import FAR, FIRST, LAST, NEAR
from pallas_kernels.flash.tpu_blocks import (
    LANES,
    Cut,
    Grid,
    Step,
    bound_of,
    cost,
    cut,
    dot_tn,
    kinds,
    where_of,
)

MOST_SCORES = 512 * 512  # of a block: 1 MiB, and some six of them at a time going backward
HEAD_DIMS = (64, 80, 96, 128, 256)
FLOATS = ("bfloat16", "float32")
ROOM = 512 * 1024  # bytes of VMEM for a block of queries; see `tpu_blocks.cut`


def block_sizes(head_dim: int, dtype: DTypeLike) -> tuple[int, int]:
    """Queries and keys at a time. At 256 x 256, a prefill of 32,768 tokens over 4 sinks and a
    window of 4,092 computes 1.07 times the scores that the mask grants, and a chunk of it over a
    ring at most 1.13 times; at 512 x 512 these are 1.13 and 1.24."""
    return 256, 256


def refuses(call: Call, x: Inputs) -> str | None:
    """Why these kernels can't serve a call, or None."""
    B, H, T, D = x.q.shape
    K = x.k.shape[2]
    kinds = {jnp.dtype(a.dtype).name for a in (x.k, x.v)}
    if D not in HEAD_DIMS:
        return f"head_dim {D}: expected one of {', '.join(map(str, HEAD_DIMS))}"
    if x.q.dtype.name not in FLOATS:
        return f"queries of {x.q.dtype.name}: expected {' or '.join(FLOATS)}"
    if len(kinds) > 1 or not kinds <= {*FLOATS, "int8", "int4"}:
        return (
            f"keys and values of {', '.join(sorted(kinds))}: expected bfloat16, float32, int8 or "
            "int4 for both"
        )
    if x.k_scale is not None and call.block_k % LANES and call.block_k < K:
        return f"block_k {call.block_k}: expected a multiple of {LANES} for {x.k.dtype.name}"
    for name, block, length in ("block_q", call.block_q, T), ("block_k", call.block_k, K):
        if block % 16 and block < length:
            return f"{name} {block}: expected a multiple of 16, or at least the length {length}"
        if -(-length // block) >= 1 << pairs.OUTER_BITS:
            return f"{name} {block}: {length} tokens make more blocks than a list can name"
    block_q, block_k = min(call.block_q, T), min(call.block_k, K)
    if block_q * block_k > MOST_SCORES:
        return (
            f"blocks of {block_q} x {block_k}: more than VMEM holds, expected {MOST_SCORES} scores"
        )
    if tpu_parts.count(call, x) is None:
        return (
            f"lists of block pairs of {tpu_parts.list_bytes(call, x)} bytes: scalar memory has "
            f"{tpu_parts.LIST_ROOM} for them"
        )
    return None


def forward(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    """As `reference.forward`."""
    return tpu_parts.in_parts(_forward, call, x, places)


def backward(
    call: Call, x: Inputs, places: Places, lse: Array, delta: Array, dout: Array
) -> Inputs:
    """As `xla.backward`."""
    return tpu_parts.in_parts(tpu_backward.backward, call, x, places, lse, delta, dout)


def _forward(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    c = cut(call, x, places, ROOM)
    bound = bound_of(call, c)
    state = pairs.states(call, places, x.q_sinks is not None)
    rows, lists = state.shape[:2]
    size = bound.near + bound.far + bound.idle
    words = pairs.pair_list(state.reshape(rows * lists, *state.shape[2:]), size)
    grid = Grid(c, lists, rows, size, inner_keys=True)
    where = where_of(c, places)
    if x.k_scale is not None:
        x = x._replace(k=_in_place(c, call, x.k), v=_in_place(c, call, x.v))

    outputs = (
        jax.ShapeDtypeStruct((c.B, c.H, c.T, c.D), call.out_dtype),
        jax.ShapeDtypeStruct((c.B, c.H, c.count_q, 1, c.block_q), jnp.float32),
    )
    row = pltpu.VMEM((c.heads, 1, c.block_q), jnp.float32)
    run = grid.call(
        functools.partial(_kernel, call, grid, kinds(call.rule, x)),
        words,
        in_specs=(grid.inputs(x), grid.where(where)),
        out_specs=(grid.queries(), grid.rows_of_queries(1)),
        out_shape=outputs,
        scratch_shapes=(row, row, pltpu.VMEM((c.heads, c.D, c.block_q), jnp.float32)),
        cost_estimate=cost(grid, bound, x, 2, 1, (x.q, x.q_sinks, outputs), (x.k, x.v)),
        interpret=call.interpret,
        name="flash_forward",
    )
    out, lse = run(x, where)
    return out, lse.reshape(c.B, c.H, -1)[..., : c.T]


def _in_place(c: Cut, call: Call, a: Array) -> Array:
    """A ring's array as the kernel takes it, without a copy."""
    a = a.swapaxes(2, 3) if c.turned else a
    # XLA else moves rings that fit to its own part of VMEM, whole.
    return a if call.interpret is not None else pltpu.with_memory_space_constraint(a, pltpu.HBM)


def _kernel(call, grid, kinds, words, x, where, out, lse, peak, total, sums):
    c = grid.cut
    word = grid.word(words, *(pl.program_id(axis) for axis in range(3)))

    @pl.when((word & FIRST) != 0)
    def _():
        peak[...] = jnp.full_like(peak, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def step(kind: int) -> None:
        block = Step(call.rule, c, kind, x, where, grid.query_block(word), grid.key_block(word))
        for h in range(c.heads):
            k, v = block.keys(x.k, h), block.keys(x.v, h)
            scores, _ = block.scores(h, k)
            new = jnp.maximum(peak[h], jnp.max(scores, axis=0, keepdims=True))
            base = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp(scores - base)
            shrink = jnp.exp(peak[h] - base)
            peak[h] = new
            total[h] = total[h] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            if x.v_scale is not None:
                weights *= block.scale(x.v_scale, h)
            sums[h] = sums[h] * shrink + dot_tn(v, weights)

    for kind in kinds:
        pl.when((word & (NEAR | FAR)) == kind)(functools.partial(step, kind))

    @pl.when((word & LAST) != 0)
    def _():
        for h in range(c.heads):
            some = total[h] > 0
            whole = jnp.where(some, total[h], 1.0)
            out[0, h] = (sums[h] / whole).T.astype(out.dtype)
            lse[0, h, 0] = jnp.where(some, peak[h] + jnp.log(whole), -jnp.inf)
