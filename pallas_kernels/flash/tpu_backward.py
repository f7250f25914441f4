"""Mosaic TPU: the gradients. One kernel for those of the queries, over the pairs in the order of
the forward pass, and one for those of the keys and values, over the same pairs by key block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import pairs
from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.pairs import FAR, FIRST, LAST, NEAR
from pallas_kernels.flash.tpu_blocks import (
    Grid,
    Step,
    bound_of,
    by_block,
    cost,
    cut,
    dot_nn,
    dot_tn,
    kinds,
    where_of,
)

ROOM = 256 * 1024  # bytes of VMEM for a block of queries; see `tpu_blocks.cut`


def backward(
    call: Call, x: Inputs, places: Places, lse: Array, delta: Array, dout: Array
) -> Inputs:
    """As `xla.backward`."""
    c = cut(call, x, places, ROOM)
    bound = bound_of(call, c)
    state = pairs.states(call, places, x.q_sinks is not None)
    rows, lists = state.shape[:2]
    state = state.reshape(rows * lists, *state.shape[2:])
    where = where_of(c, places)
    # exp(score − ∞) is 0: a query that saw nothing passes nothing on.
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)
    statistics = jnp.stack(
        [by_block(lse, c.block_q, jnp.inf), by_block(delta, c.block_q, 0.0)], axis=3
    )
    dout = dout.astype(x.q.dtype)
    arrays = (x, where, statistics, dout)
    steps = kinds(call.rule, x)
    once = (x.q, x.q_sinks, dout, statistics)

    def in_specs(grid: Grid):
        return grid.inputs(x), grid.where(where), grid.rows_of_queries(2), grid.queries()

    size = bound.near + bound.far + bound.idle
    grid = Grid(c, lists, rows, size, inner_keys=True)
    dq = jax.ShapeDtypeStruct(x.q.shape, jnp.float32)
    both = x.q_sinks is not None
    sums = pltpu.VMEM((c.heads, c.D, c.block_q), jnp.float32)
    queries = (dq, dq) if both else (dq,)
    run = grid.call(
        functools.partial(_query_kernel, call, grid, steps),
        pairs.pair_list(state, size),
        in_specs=in_specs(grid),
        out_specs=(grid.queries(),) * len(queries),
        out_shape=queries,
        scratch_shapes=(sums,) * len(queries),
        cost_estimate=cost(grid, bound, x, 3, 2, (once, queries), (x.k, x.v)),
        interpret=call.interpret,
        name="flash_backward_queries",
    )
    dq, dq_sinks = (*run(*arrays), None)[:2]

    size = bound.near + bound.far + c.count_k
    grid = Grid(c, lists, rows, size, inner_keys=False)
    keys = (jax.ShapeDtypeStruct((c.B, c.programs * c.kv_heads, c.K, c.D), jnp.float32),) * 2
    sums = pltpu.VMEM((c.kv_heads, c.block_k, c.D), jnp.float32)
    run = grid.call(
        functools.partial(_key_kernel, call, grid, steps),
        pairs.pair_list(state.swapaxes(1, 2), size),
        in_specs=in_specs(grid),
        out_specs=(grid.key_sums(),) * 2,
        out_shape=keys,
        scratch_shapes=(sums, sums),
        cost_estimate=cost(grid, bound, x, 4, 2, (x.k, x.v, keys), once),
        interpret=call.interpret,
        name="flash_backward_keys",
    )
    # Where a KV head's queries are shared out over programs, each gives a part of the sum.
    dk, dv = (jnp.sum(a.reshape(c.B, c.Hkv, -1, c.K, c.D), axis=2) for a in run(*arrays))
    return Inputs(dq, dk, dv, dq_sinks)


def _query_kernel(call, grid, kinds, words, x, where, statistics, dout, *refs):
    c = grid.cut
    word = grid.word(words, *(pl.program_id(axis) for axis in range(3)))
    outs, sums = refs[: len(refs) // 2], refs[len(refs) // 2 :]

    @pl.when((word & FIRST) != 0)
    def _():
        for a in sums:
            a[...] = jnp.zeros_like(a)

    def step(kind: int) -> None:
        block = Step(call.rule, c, kind, x, where, grid.query_block(word), grid.key_block(word))
        for h in range(c.heads):
            k, v = block.keys(x.k, h), block.keys(x.v, h)
            _, ds = block.gradients(h, k, v, statistics, block.queries(dout, h))
            for a, part in zip(sums, block.by_query(ds), strict=True):
                if part is not None:
                    a[h] += dot_tn(k[: part.shape[0]], part)

    for kind in kinds:
        pl.when((word & (NEAR | FAR)) == kind)(functools.partial(step, kind))

    @pl.when((word & LAST) != 0)
    def _():
        for a, out in zip(sums, outs, strict=True):
            for h in range(c.heads):
                out[0, h] = a[h].T


def _key_kernel(call, grid, kinds, words, x, where, statistics, dout, dk, dv, k_sums, v_sums):
    c = grid.cut
    word = grid.word(words, *(pl.program_id(axis) for axis in range(3)))

    @pl.when((word & FIRST) != 0)
    def _():
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    def step(kind: int) -> None:
        block = Step(call.rule, c, kind, x, where, grid.query_block(word), grid.key_block(word))
        for h in range(c.heads):
            k, v, to = block.keys(x.k, h), block.keys(x.v, h), h // c.group
            d = block.queries(dout, h)
            weights, ds = block.gradients(h, k, v, statistics, d)
            v_sums[to, : block.count_k] += dot_nn(weights.astype(d.dtype), d)
            for ref, part in zip((x.q, x.q_sinks), block.by_query(ds), strict=False):
                if part is not None:
                    q = block.queries(ref, h)
                    k_sums[to, : part.shape[0]] += dot_nn(part.astype(q.dtype), q)

    for kind in kinds:
        pl.when((word & (NEAR | FAR)) == kind)(functools.partial(step, kind))

    @pl.when((word & LAST) != 0)
    def _():
        dk[0] = k_sums[...]
        dv[0] = v_sums[...]
