"""Flash attention on Hopper: wgmma and TMA, through Mosaic GPU.

A block of three warpgroups serves a tile of 128 queries of one head: one brings the listed tiles of
keys and values in, the other two take 64 queries each and alternate, so that one's softmax runs
under the other's products (the schedule of FlashAttention-3, arXiv 2407.08608, section 3.1).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash import gpu_backward
from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.gpu_parts import (
    HIDDEN,
    LOG2E,
    add_products,
    along,
    bias_of,
    kernel,
    log2_factor,
    mask,
    next_slot,
    over,
    product,
    registers,
    scores,
    zeros,
)
from pallas_kernels.flash.gpu_tiles import ROWS, Problem, warpgroups_of
from pallas_kernels.flash.vjp import merged
from pallas_kernels.ring import Ring, floats

HEAD_DIMS = (64, 80, 96, 128, 256)
SLAB = 8192  # keys that are made into bfloat16 at a time


def refuses(call: Call, x: Inputs) -> str | None:
    """Why this kernel can't serve a call; None: it can."""
    D = x.q.shape[3]
    if D not in HEAD_DIMS:
        return f"head_dim {D}: expected one of {', '.join(map(str, HEAD_DIMS))}"
    quantised = x.k_scale is not None
    checked = dict(q=x.q, q_sinks=x.q_sinks) | ({} if quantised else dict(k=x.k, v=x.v))
    for name, array in checked.items():
        if array is not None and array.dtype != jnp.bfloat16:
            return f"{name} is {array.dtype}: expected bfloat16 (tf32 would round float32)"
    if call.block_q % ROWS or call.block_k % ROWS:
        sizes = (call.block_q, call.block_k)
        return f"block_sizes {sizes}: expected multiples of {ROWS}, the rows of a wgmma"
    if call.rule.scale <= 0:
        return f"scale {call.rule.scale}: expected > 0"
    if call.interpret is None and jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != "9.0":
            return f"needs Hopper (compute capability 9.0: H100, H200), got {capability}"
    return None


def block_sizes(head_dim: int, dtype) -> tuple[int, int]:
    """Queries and keys in a block of the block map."""
    del head_dim, dtype
    return 128, 128


def forward(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    """As `reference.forward`."""
    return (_forward if x.k_scale is None else _in_slabs)(call, x, places)


def _in_slabs(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    """Of integers, which wgmma does not multiply with bfloat16: made into it a slab of keys at a
    time, so that there is never a copy of all, and only where something is visible."""
    B, H, T, D = x.q.shape
    K, block = x.k.shape[2], call.block_k
    whole = max(SLAB // block, 1) * block

    def add(first, size: int, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        def cut(a: Array, axis: int = 2) -> Array:
            return lax.dynamic_slice_in_dim(a, first, size, axis)

        count = -(-size // block)
        blocks = lax.dynamic_slice_in_dim(places.blocks, lax.div(first, block), count, axis=3)

        def attend() -> tuple[Array, Array]:
            held = floats(Ring(*map(cut, (x.k, x.v, x.k_scale, x.v_scale))), jnp.bfloat16)
            here = places._replace(k_ticks=cut(places.k_ticks, 1), blocks=blocks)
            part = Inputs(x.q, held.k, held.v, x.q_sinks)
            return _forward(call._replace(most=count, out_dtype=jnp.float32), part, here)

        return merged([sums, lax.cond(jnp.any(blocks), attend, lambda: none)])

    none = jnp.zeros((B, H, T, D)), jnp.full((B, H, T), -jnp.inf)
    sums = none
    if K >= whole:
        sums = lax.fori_loop(0, K // whole, lambda n, sums: add(n * whole, whole, sums), sums)
    if K % whole:
        sums = add(jnp.int32(K - K % whole), K % whole, sums)
    return sums[0].astype(call.out_dtype), sums[1]


def _forward(call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    T, D = x.q.shape[2:]
    # Registers: a warpgroup's output takes D of a thread's 240, its scores tile_k / 2.
    warpgroups = warpgroups_of(call.block_q)
    tile_k = math.gcd(call.block_k, 128 if D <= 128 else 64)
    p = Problem(call, x, places, tile_q=warpgroups * ROWS, tile_k=tile_k)
    operands = (p.queries, p.x.k, p.x.v, p.sweeps, p.visits(), p.k_ticks, places.slopes)
    leaves, structure = jax.tree.flatten(operands)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        _forward_tile(p, inputs, *refs[len(leaves) :])

    stages = 2 if D > 64 else 4
    keys = plgpu.SMEM((stages, p.tile_k, p.head_dim), jnp.bfloat16)
    full = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    out, lse = kernel(
        body,
        call.interpret,
        out_type=[
            jax.ShapeDtypeStruct(p.x.q.shape, call.out_dtype),
            jax.ShapeDtypeStruct(p.x.q.shape[:3], jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((warpgroups, ROWS, p.head_dim), jnp.bfloat16),
            keys,
            keys,
            plgpu.Barrier(num_arrivals=warpgroups),  # queries have come
            plgpu.Barrier(num_arrivals=warpgroups),  # queries are done with
            (full, free),
            (full, free),
            plgpu.Barrier(num_arrivals=2),  # a turn at the tensor cores ends
        ],
        grid=(p.H, p.tiles_q, p.B),
        grid_names=("head", "tile", "row"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
    )(*leaves)
    return out[:, :, :T, :D], lse[:, :, :T]


def _forward_tile(
    p: Problem,
    inputs,
    out_ref,
    lse_ref,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_free,
    k_bars,
    v_bars,
    turn,
):
    queries, k_ref, v_ref, sweeps, lists, k_ticks, slopes = inputs
    row, head = lax.axis_index("row"), lax.axis_index("head")
    # The last tiles of a causal chunk take longest: they go first.
    tile = p.tiles_q - 1 - lax.axis_index("tile")
    me = lax.axis_index("warpgroup")
    warpgroups, stages = q_smem.shape[0], k_smem.shape[0]
    here = [each.at(row, head, p.H, tile) for each in lists]

    @pl.when(me == warpgroups)
    def bring():
        registers(warpgroups, computes=False)
        first = 0
        for s, (order, _, count) in enumerate(here):
            if s > 0:
                plgpu.barrier_wait(q_free)
            for w in range(warpgroups):
                q_rows = pl.ds(tile * p.tile_q + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(queries[s].at[row, head, q_rows], q_smem.at[w], q_full)

            def bring_keys(n, _, order=order, first=first):
                keys = (row, lax.div(head, p.group), pl.ds(order(n) * p.tile_k, p.tile_k))
                for ref, smem, (come, gone) in ((k_ref, k_smem, k_bars), (v_ref, v_smem, v_bars)):
                    slot = next_slot(first + n, smem, gone)
                    plgpu.copy_gmem_to_smem(ref.at[keys], smem.at[slot], come.at[slot])

            lax.fori_loop(0, count, bring_keys, None)
            first += count

    @pl.when(me < warpgroups)
    def attend():
        registers(warpgroups, computes=True)
        base = tile * p.tile_q + me * ROWS
        shape = (ROWS, p.tile_k)

        def take_turns():
            if warpgroups == 2:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def rows(ref):
            return plgpu.load(ref.at[row, pl.ds(base, ROWS)], layout=along(0), optimized=False)

        def step(n, carry, *, order, count, first, masked: bool, bounds, seat):
            out, peak, sums = carry
            slot = lax.rem(first + n, stages)
            if masked:
                at = pl.ds(order(n) * p.tile_k, p.tile_k)
                ticks = plgpu.load(k_ticks.at[row, at], layout=along(1), optimized=False)
            raw = product(q_smem.at[me], k_smem.at[slot].transpose((1, 0)), p.interpret, take_turns)
            plgpu.barrier_arrive(k_bars[1].at[slot])
            bias = None
            if seat is not None:
                bias = bias_of(seat, ticks, shape, 0, slopes[head])
            x, _ = scores(p.rule, raw, bias)
            if masked:
                x = jnp.where(mask(bounds, ticks, shape, 0), x, -jnp.inf)
            factor = log2_factor(p.rule, biased=bias is not None)
            new = jnp.maximum(peak, jnp.max(x, axis=1) * factor)
            weights = jnp.exp2(x * factor - over(new, shape, 0))
            shrink = jnp.exp2(peak - new)
            out *= over(shrink, out.shape, 0)
            sums = sums * shrink + jnp.sum(weights, axis=1)
            weights = weights.astype(jnp.bfloat16)
            out, new, sums, weights = lax.optimization_barrier((out, new, sums, weights))
            if warpgroups == 2:
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_bars[0].at[slot])
            if warpgroups == 2:
                plgpu.barrier_wait(turn)

            following = lax.rem(first + n + 1, stages)

            def await_next():
                @pl.when(n + 1 < count)
                def _():
                    plgpu.barrier_wait(k_bars[0].at[following])

            values = v_smem.at[slot]
            (out,) = add_products([(out, weights, values)], p.interpret, await_next)
            plgpu.barrier_arrive(v_bars[1].at[slot])
            return out, new, sums

        def vector(value):
            return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), along(0))

        carry = zeros(p.head_dim), vector(HIDDEN), vector(0)

        first = 0
        for s, (sweep, (order, full, count)) in enumerate(zip(sweeps, here, strict=True)):
            plgpu.barrier_wait(q_full)
            bounds = [(rows(a), rows(b)) for a, b in sweep.bounds]
            seat = None if sweep.seat is None else rows(sweep.seat)

            @pl.when(count > 0)
            def await_first(first=first):
                plgpu.barrier_wait(k_bars[0].at[lax.rem(first, stages)])

            pl.when(me == 1)(take_turns)  # The second warpgroup stays half a step behind.
            this = functools.partial(
                step, order=order, count=count, first=first, bounds=bounds, seat=seat
            )
            if seat is None:
                carry = lax.fori_loop(0, full, functools.partial(this, masked=False), carry)
            carry = lax.fori_loop(full, count, functools.partial(this, masked=True), carry)
            pl.when(me == 0)(take_turns)
            if s + 1 < len(sweeps):
                plgpu.barrier_arrive(q_free)
            first += count

        out, peak, sums = carry
        some = sums > 0
        share = jnp.where(some, 1 / jnp.where(some, sums, 1.0), 0.0)
        out = (out * over(share, out.shape, 0)).astype(out_ref.dtype)
        lse = jnp.where(some, (peak + jnp.log2(jnp.where(some, sums, 1.0))) / LOG2E, -jnp.inf)
        at = (row, head, pl.ds(base, ROWS))
        plgpu.store(out_ref.at[at], out, optimized=False)
        plgpu.store(lse_ref.at[at], lse, optimized=False)


def backward(
    call: Call, x: Inputs, places: Places, lse: Array, delta: Array, dout: Array
) -> Inputs:
    """As `xla.backward`."""
    return gpu_backward.backward(call, x, places, lse, delta, dout)
