"""The backward pass on Hopper: a kernel over tiles of queries, which gives their gradient, and one
over tiles of keys, for that of keys and values. Nothing is added up in device memory, so that a
gradient is the same each time; the price is that scores are computed twice."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.gpu_parts import (
    LOG2E,
    add_products,
    along,
    bias_of,
    kernel,
    log2_factor,
    mask,
    next_slot,
    over,
    product_pair,
    registers,
    scores,
    zeros,
)
from pallas_kernels.flash.gpu_tiles import ROWS, Problem, filled, warpgroups_of

# Keys or queries that a step takes: the least K of a wgmma on rows of 128 bytes.
INNER = 64


def backward(
    call: Call, x: Inputs, places: Places, lse: Array, delta: Array, dout: Array
) -> Inputs:
    """As `xla.backward`."""
    dqs = _of_queries(call, x, places, lse, delta, dout)
    if x.q_sinks is None:
        dq, dq_sinks = sum(dqs[1:], start=dqs[0]), None
    else:
        dq, dq_sinks = dqs if len(dqs) == 2 else (dqs[0], jnp.zeros_like(dqs[0]))
    # Both gradients of 256 wide keys do not fit into the registers of one warpgroup.
    both = x.q.shape[3] <= 128
    wanted = [("k", "v")] if both else [("k",), ("v",)]
    grads = [_of_keys(call, x, places, lse, delta, dout, wanted=w) for w in wanted]
    dk, dv = [grad for some in grads for grad in some]
    return Inputs(dq, dk, dv, dq_sinks)


def _rows(p: Problem, lse: Array, delta: Array, dout: Array) -> tuple[Array, Array, Array]:
    """What belongs to queries, in whole tiles. exp(score − ∞) is 0: a query that saw nothing
    passes nothing on."""
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, jnp.inf)
    dout = filled(filled(dout.astype(jnp.bfloat16), 2, p.tile_q), 3, p.head_dim)
    return filled(lse, 2, p.tile_q, jnp.inf), filled(delta, 2, p.tile_q), dout


def _of_queries(call, x: Inputs, places: Places, lse, delta, dout) -> list[Array]:
    """The gradient of the queries of each sweep."""
    T, D = x.q.shape[2:]
    warpgroups = warpgroups_of(call.block_q)
    p = Problem(call, x, places, tile_q=warpgroups * ROWS, tile_k=INNER)
    rows = _rows(p, lse, delta, dout)
    operands = (p.queries, p.x.k, p.x.v, p.sweeps, p.visits(), p.k_ticks, places.slopes, *rows)
    leaves, structure = jax.tree.flatten(operands)
    sweeps = len(p.sweeps)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        outs = refs[len(leaves) : len(leaves) + sweeps]
        _query_tile(p, inputs, outs, *refs[len(leaves) + sweeps :])

    queries = plgpu.SMEM((warpgroups, ROWS, p.head_dim), jnp.bfloat16)
    slots = 4 if p.head_dim <= 128 else 3  # as many as fit
    grads = kernel(
        body,
        call.interpret,
        out_type=[jax.ShapeDtypeStruct(p.x.q.shape, jnp.float32)] * sweeps,
        scratch_types=[
            queries,
            queries,
            plgpu.SMEM((slots, INNER, p.head_dim), jnp.bfloat16),  # keys, values, keys, values, …
            plgpu.Barrier(num_arrivals=warpgroups),  # queries have come
            plgpu.Barrier(num_arrivals=warpgroups),  # queries are done with
            plgpu.Barrier(num_arrivals=warpgroups),  # the gradient of the output has come
            plgpu.Barrier(num_barriers=slots),  # a tile has come
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slots),  # a tile is done with
        ],
        grid=(p.H, p.tiles_q, p.B),
        grid_names=("head", "tile", "row"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
    )(*leaves)
    return [g[:, :, :T, :D] for g in grads]


def _query_tile(
    p: Problem, inputs, outs, q_smem, do_smem, ring, q_full, q_free, do_full, full, free
):
    queries, k_ref, v_ref, sweeps, lists, k_ticks, slopes, lse_ref, delta_ref, do_ref = inputs
    row, head = lax.axis_index("row"), lax.axis_index("head")
    tile = p.tiles_q - 1 - lax.axis_index("tile")
    me, warpgroups = lax.axis_index("warpgroup"), q_smem.shape[0]
    here = [each.at(row, head, p.H, tile) for each in lists]

    @pl.when(me == warpgroups)
    def bring():
        registers(warpgroups, computes=False)
        first = 0
        for s, (order, _, count) in enumerate(here):
            if s > 0:
                plgpu.barrier_wait(q_free)
            for w in range(warpgroups):
                at = (row, head, pl.ds(tile * p.tile_q + w * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(queries[s].at[at], q_smem.at[w], q_full)
                if s == 0:
                    plgpu.copy_gmem_to_smem(do_ref.at[at], do_smem.at[w], do_full)

            def bring_keys(n, _, order=order, first=first):
                keys = (row, lax.div(head, p.group), pl.ds(order(n) * p.tile_k, p.tile_k))
                for i, ref in enumerate((k_ref, v_ref)):
                    slot = next_slot(2 * (first + n) + i, ring, free)
                    plgpu.copy_gmem_to_smem(ref.at[keys], ring.at[slot], full.at[slot])

            lax.fori_loop(0, count, bring_keys, None)
            first += count

    @pl.when(me < warpgroups)
    def attend():
        registers(warpgroups, computes=True)
        base = tile * p.tile_q + me * ROWS
        shape = (ROWS, p.tile_k)

        def load(ref, *at):
            at = (*at, pl.ds(base, ROWS))
            return plgpu.load(ref.at[at], layout=along(0), optimized=False)

        lse, delta = load(lse_ref, row, head), load(delta_ref, row, head)
        plgpu.barrier_wait(do_full)
        first = 0
        for s, (sweep, (order, every, count)) in enumerate(zip(sweeps, here, strict=True)):
            plgpu.barrier_wait(q_full)
            bounds = [(load(a, row), load(b, row)) for a, b in sweep.bounds]
            seat = None if sweep.seat is None else load(sweep.seat, row)

            def step(n, dq, masked, *, order=order, first=first, bounds=bounds, seat=seat):
                at_k, at_v = (lax.rem(2 * (first + n) + i, ring.shape[0]) for i in (0, 1))
                keys, values = ring.at[at_k], ring.at[at_v]
                bias = ticks = None
                if masked:
                    at = pl.ds(order(n) * p.tile_k, p.tile_k)
                    ticks = plgpu.load(k_ticks.at[row, at], layout=along(1), optimized=False)
                if seat is not None:
                    bias = bias_of(seat, ticks, shape, 0, slopes[head])
                plgpu.barrier_wait(full.at[at_k])
                plgpu.barrier_wait(full.at[at_v])

                def weigh(raw):
                    weights, slope = _weights(p, raw, bias, over(lse, shape, 0))
                    if masked:
                        weights = jnp.where(mask(bounds, ticks, shape, 0), weights, 0.0)
                    return weights if slope is None else weights * slope

                weights, dp = product_pair(
                    (q_smem.at[me], keys.transpose((1, 0))),
                    (do_smem.at[me], values.transpose((1, 0))),
                    p.interpret,
                    weigh,
                )
                plgpu.barrier_arrive(free.at[at_v])
                ds = (weights * (dp - over(delta, shape, 0))).astype(jnp.bfloat16)
                (dq,) = add_products([(dq, ds, keys)], p.interpret)
                plgpu.barrier_arrive(free.at[at_k])
                return dq

            dq = zeros(p.head_dim)
            if seat is None:
                dq = lax.fori_loop(0, every, functools.partial(step, masked=False), dq)
            dq = lax.fori_loop(every, count, functools.partial(step, masked=True), dq)
            if s + 1 < len(sweeps):
                plgpu.barrier_arrive(q_free)
            first += count
            at = (row, head, pl.ds(base, ROWS))
            plgpu.store(outs[s].at[at], dq * p.rule.scale, optimized=False)


def _weights(p: Problem, raw: Array, bias: Array | None, lse: Array) -> tuple[Array, Array | None]:
    """The softmax weights, and what `scores` says of their slope."""
    x, slope = scores(p.rule, raw, bias)
    return jnp.exp2(x * log2_factor(p.rule, biased=bias is not None) - lse), slope


def _of_keys(
    call, x: Inputs, places: Places, lse, delta, dout, *, wanted: tuple[str, ...]
) -> list[Array]:
    """The gradients of keys, values or both: `wanted` is of "k" and "v"."""
    K, D = x.k.shape[2:]
    warpgroups = warpgroups_of(call.block_k)
    p = Problem(call, x, places, tile_q=INNER, tile_k=warpgroups * ROWS)
    rows = _rows(p, lse, delta, dout)
    lists = p.visits(by_key=True)
    operands = (p.queries, p.x.k, p.x.v, p.sweeps, lists, p.k_ticks, places.slopes, *rows)
    leaves, structure = jax.tree.flatten(operands)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        outs = dict(zip(wanted, refs[len(leaves) :], strict=False))
        _key_tile(p, inputs, outs, *refs[len(leaves) + len(wanted) :])

    keys = plgpu.SMEM((warpgroups, ROWS, p.head_dim), jnp.bfloat16)
    slots = 4 if p.head_dim <= 128 or "k" not in wanted else 3  # as many as fit
    grads = kernel(
        body,
        call.interpret,
        out_type=[jax.ShapeDtypeStruct(p.x.k.shape, jnp.float32)] * len(wanted),
        scratch_types=[
            keys,
            keys if "k" in wanted else None,
            plgpu.SMEM((slots, INNER, p.head_dim), jnp.bfloat16),  # queries, output's gradient, …
            plgpu.SMEM((slots, INNER), jnp.float32),  # log-sum-exp, delta, …
            plgpu.Barrier(num_arrivals=warpgroups * (2 if "k" in wanted else 1)),  # keys have come
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),  # a tile and its row have come
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slots),  # and are done with
        ],
        grid=(p.Hkv, p.tiles_k, p.B),
        grid_names=("head", "tile", "row"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
    )(*leaves)
    return [g[:, :, :K, :D] for g in grads]


def _key_tile(p: Problem, inputs, outs, k_smem, v_smem, ring, ring_rows, keys_full, full, free):
    queries, k_ref, v_ref, sweeps, lists, k_ticks, slopes, lse_ref, delta_ref, do_ref = inputs
    row, kv_head = lax.axis_index("row"), lax.axis_index("head")
    tile, me = lax.axis_index("tile"), lax.axis_index("warpgroup")
    warpgroups = k_smem.shape[0]

    @pl.when(me == warpgroups)
    def bring():
        registers(warpgroups, computes=False)
        for w in range(warpgroups):
            at = (row, kv_head, pl.ds(tile * p.tile_k + w * ROWS, ROWS))
            plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[w], keys_full)
            if "k" in outs:
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[w], keys_full)

        def bring_head(g, first, s):
            head = kv_head * p.group + g
            order, _, count = lists[s].at(row, head, p.H, tile)

            def bring_queries(n, _):
                at = (row, head, pl.ds(order(n) * p.tile_q, p.tile_q))
                for i, refs in enumerate(((queries[s], lse_ref), (do_ref, delta_ref))):
                    slot = next_slot(2 * (first + n) + i, ring, free)
                    for ref, smem in zip(refs, (ring, ring_rows), strict=True):
                        plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], full.at[slot])

            lax.fori_loop(0, count, bring_queries, None)
            return first + count

        first = jnp.int32(0)
        for s in range(len(sweeps)):
            first = lax.fori_loop(0, p.group, functools.partial(bring_head, s=s), first)

    @pl.when(me < warpgroups)
    def attend():
        registers(warpgroups, computes=True)
        base = tile * p.tile_k + me * ROWS
        shape = (ROWS, p.tile_q)
        ticks = plgpu.load(k_ticks.at[row, pl.ds(base, ROWS)], layout=along(0), optimized=False)

        def step(n, grads, *, masked: bool, sweep, head, order, first):
            at_q, at_do = (lax.rem(2 * (first + n) + i, ring.shape[0]) for i in (0, 1))
            q, do = ring.at[at_q], ring.at[at_do]
            bias = bounds = None

            def load(ref):
                at = pl.ds(order(n) * p.tile_q, p.tile_q)
                return plgpu.load(ref.at[row, at], layout=along(1), optimized=False)

            if masked:
                bounds = [(load(a), load(b)) for a, b in sweep.bounds]
            if sweep.seat is not None:
                bias = bias_of(load(sweep.seat), ticks, shape, 1, slopes[head])
            plgpu.barrier_wait(full.at[at_q])
            plgpu.barrier_wait(full.at[at_do])
            lse = plgpu.load(ring_rows.at[at_q], layout=along(1))

            def weigh(raw):
                weights, slope = _weights(p, raw, bias, over(lse, shape, 1))
                if masked:
                    weights = jnp.where(mask(bounds, ticks, shape, 1), weights, 0.0)
                return weights, slope

            first_product = (k_smem.at[me], q.transpose((1, 0)))
            sums = []
            if "k" in outs:
                second = (v_smem.at[me], do.transpose((1, 0)))
                (weights, slope), dp = product_pair(first_product, second, p.interpret, weigh)
                delta = plgpu.load(ring_rows.at[at_do], layout=along(1))
                ds = weights * (dp - over(delta, shape, 1))
                ds = ds if slope is None else ds * slope
                sums.append((grads["k"], ds.astype(jnp.bfloat16), q))
            else:
                weights, _ = product_pair(first_product, None, p.interpret, weigh)
            if "v" in outs:
                sums.append((grads["v"], weights.astype(jnp.bfloat16), do))
            plgpu.commit_smem()  # Rows were read, and TMA will write the next into their place.
            new = add_products(sums, p.interpret)
            plgpu.barrier_arrive(free.at[at_q])
            plgpu.barrier_arrive(free.at[at_do])
            return dict(zip(grads, new, strict=True))

        def over_head(g, carry, s):
            first, grads = carry
            head = kv_head * p.group + g
            order, every, count = lists[s].at(row, head, p.H, tile)
            this = functools.partial(step, sweep=sweeps[s], head=head, order=order, first=first)
            if sweeps[s].seat is None:
                grads = lax.fori_loop(0, every, functools.partial(this, masked=False), grads)
            grads = lax.fori_loop(every, count, functools.partial(this, masked=True), grads)
            return first + count, grads

        plgpu.barrier_wait(keys_full)
        carry = jnp.int32(0), {name: zeros(p.head_dim) for name in outs}
        for s in range(len(sweeps)):
            carry = lax.fori_loop(0, p.group, functools.partial(over_head, s=s), carry)
        at = (row, kv_head, pl.ds(base, ROWS))
        for name, grad in carry[1].items():
            grad = grad * p.rule.scale if name == "k" else grad
            plgpu.store(outs[name].at[at], grad, optimized=False)
