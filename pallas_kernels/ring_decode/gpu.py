"""Mosaic GPU: one pass over the ring on Hopper's tensor cores, new tokens written in place.

A block takes a share of the slots of one row and KV head. It copies tiles of keys and values into
shared memory, several in flight, and attends to them with all queries of that head at once: they
are the rows of one matrix product of 64 rows, so that GQA and several new tokens cost no second
read. The shares' outputs are merged outside (flash-decoding).

What is not bfloat16 is taken apart into bfloat16 terms, exactly: an integer is one term, a float32
three; so every product is one, three or six of the tensor cores, accumulated in float32. (Weights
are rounded to bfloat16 where the queries are bfloat16.)

With `q_sinks` each query has two rows: one sees the window alone, one the sinks alone; merging
them is the same sum of exponentials that merges the shares.

Nothing orders the blocks of a grid, and nothing needs to: a slot is read and written by the block
whose share it lies in, after its reads, and by no other. The new tokens are attended to from their
own operand; a slot that one of them overwrites is out of the window of every query that comes at
or after it, and until then its old token is still to be seen.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash.rule import slot_of
from pallas_kernels.ring import Ring
from pallas_kernels.ring_decode.call import Call

HEAD_DIMS = (64, 80, 96, 128, 256)
ROWS = 64  # of a warpgroup's matrix product
BLOCKS = (64, 32, 16)  # slots that a block takes at a time
STAGES = 8  # of them in flight, at most
SMS, SHARED = 132, 227 * 1024  # of an H100 or H200; bytes of shared memory a multiprocessor
TERMS = {"bfloat16": 1, "float32": 3, "int8": 1, "int4": 1}
LOG2E = math.log2(math.e)


def refuses(
    call: Call,
    q: Array,
    q_sinks: Array | None,
    new: Ring,
    ring: Ring,
    ticks: Array,
    slopes: Array | None,
) -> str | None:
    """Why this kernel can't serve a call; None where it can."""
    D, C = ring.k.shape[3], ring.k.shape[2]
    kinds = ring.k.dtype.name, q.dtype.name
    if kinds[0] not in TERMS:
        return f"a ring of {kinds[0]}: expected one of {', '.join(TERMS)}"
    if kinds[1] not in ("bfloat16", "float32"):
        return f"queries of {kinds[1]}: expected bfloat16 or float32"
    if D not in HEAD_DIMS:
        return f"head_dim {D}: expected one of {', '.join(map(str, HEAD_DIMS))}"
    if D * _bits(ring.k.dtype) % 128:
        return f"head_dim {D} in {kinds[0]}: a row must be a multiple of 16 bytes"
    rows = _query_rows(q, q_sinks, ring)
    if rows > ROWS:
        return f"{rows} query rows a KV head (GQA x new tokens x 2 with q_sinks): at most {ROWS}"
    if ring.k_scale is not None and C % 4:
        return f"a ring of {C} slots with scales: expected a multiple of 4"
    sizes = [n for n in BLOCKS if n >= 32 or ring.k_scale is None]  # copies of 128 bytes
    if call.block_size not in (None, *sizes):
        return f"block_size {call.block_size}: expected one of {', '.join(map(str, sizes))}"
    if call.block_size is not None and q.shape[2] > call.block_size:
        return f"{q.shape[2]} new tokens: at most block_size, {call.block_size}"
    if _plan(call, q, q_sinks, ring) is None:
        return f"head_dim {D} in {kinds[0]}: its blocks do not fit into shared memory"
    if call.interpret is None and jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        if not capability.startswith("9."):
            return f"compute capability {capability}: expected Hopper, 9.x"
    return None


class _Plan(NamedTuple):
    """How a call is cut.

    Attributes:
        tile: slots a block attends to at a time.
        stages: tiles in shared memory.
        share: tiles a block has in all.
        splits: blocks a row and KV head.
        rows: query rows that are computed for a purpose, a multiple of 8.
        q_terms, k_terms: bfloat16 terms of a query (and a weight), and of a key or value.
    """

    tile: int
    stages: int
    share: int
    splits: int
    rows: int
    q_terms: int
    k_terms: int


def _plan(call: Call, q: Array, q_sinks: Array | None, ring: Ring) -> _Plan | None:
    """How to cut a call: two blocks a multiprocessor, or else one; two tiles in flight or more.
    None: nothing fits."""
    B, Hkv, C, _ = ring.k.shape
    T = q.shape[2]
    rows = -(-_query_rows(q, q_sinks, ring) // 8) * 8
    terms = TERMS[q.dtype.name], TERMS[ring.k.dtype.name]
    if call.block_size is None:
        ways = [(2, BLOCKS[0]), *((1, n) for n in BLOCKS if n >= 32 or ring.k_scale is None)]
    else:
        ways = [(2, call.block_size), (1, call.block_size)]
    for (blocks, tile), stages in itertools.product(ways, range(STAGES, 1, -1)):
        tiles = -(-C // tile)
        share = _share(B * Hkv, tiles, SMS * blocks)
        splits = -(-tiles // share)
        plan = _Plan(tile, min(stages, share + 1), share, splits, rows, *terms)
        if T <= tile and _shared_bytes(_scratch(plan, ring, T)) <= SHARED // blocks:
            return plan
    return None


def _share(pairs: int, tiles: int, slots: int) -> int:
    """How many of the tiles of a row and KV head a block takes, of `pairs` of these, where `slots`
    blocks run at a time: the fastest, if beginning and end of a block take as long as a tile."""

    def time(share: int) -> int:
        rounds = -(-pairs * -(-tiles // share) // slots)
        return rounds * (share + 1)

    return min(range(tiles, 0, -1), key=time)


def _shared_bytes(scratch: dict[str, Any]) -> int:
    def size(ref: Any) -> int:
        if isinstance(ref, plgpu.Barrier):
            return 64
        return -(-math.prod(ref.shape) * _bits(ref.dtype) // 8192) * 1024

    leaves = jax.tree.leaves(scratch, is_leaf=lambda x: not isinstance(x, (dict, list)))
    reductions, alignment = 4096, 1024
    return sum(map(size, leaves)) + reductions + alignment


def _query_rows(q: Array, q_sinks: Array | None, ring: Ring) -> int:
    return q.shape[1] // ring.k.shape[1] * q.shape[2] * (1 if q_sinks is None else 2)


def _bits(dtype: Any) -> int:
    return 4 if jnp.dtype(dtype) == jnp.int4 else jnp.dtype(dtype).itemsize * 8


def decode(
    call: Call,
    q: Array,
    q_sinks: Array | None,
    new: Ring,
    ring: Ring,
    ticks: Array,
    slopes: Array | None,
) -> tuple[Array, Array, Ring]:
    """As `reference.decode`."""
    plan = _plan(call, q, q_sinks, ring)
    assert plan is not None
    B, H, T, D = q.shape
    Hkv = ring.k.shape[1]
    G = H // Hkv
    sides = [q] if q_sinks is None else [q, q_sinks]

    queries = jnp.concatenate([x.reshape(B, Hkv, G * T, D) for x in sides], axis=2)
    queries = jnp.stack(_terms(_padded(queries, 2, plan.rows), plan.q_terms))
    tokens = T + _apart(ring) - 1
    tokens = tokens if tokens < 8 else -(-tokens // 8) * 8
    inputs = [ticks, queries, _padded(new.k, 2, tokens), _padded(new.v, 2, tokens)]
    inputs += [_padded(x, 2, plan.tile) for x in (new.k_scale, new.v_scale) if x is not None]
    if slopes is not None:
        by_row = jnp.tile(jnp.repeat(slopes.reshape(Hkv, G), T, axis=1), (1, len(sides)))
        inputs.append(_padded(by_row, 1, ROWS) * LOG2E)
    refs = [jax.new_ref(x) for x in ring if x is not None]

    kernel = plgpu.kernel(
        functools.partial(_kernel, call, plan, G, T, q_sinks is not None, ring.k_scale is not None),
        out_type=[
            jax.ShapeDtypeStruct((B, Hkv, plan.splits, plan.rows, D), jnp.float32),
            jax.ShapeDtypeStruct((B, Hkv, plan.splits, plan.rows), jnp.float32),
        ],
        grid=(B, Hkv, plan.splits),
        grid_names=("row", "head", "split"),
        scratch_types=_scratch(plan, ring, T),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=call.interpret,
    )
    out, lse = kernel(*inputs, *refs)
    after = [jax.freeze(x) for x in refs] + [None] * (len(ring) - len(refs))

    parts = plan.splits * len(sides)
    out = out[:, :, :, : G * T * len(sides)].reshape(B, Hkv, parts, G * T, D)
    lse = lse[:, :, :, : G * T * len(sides)].reshape(B, Hkv, parts, G * T)
    peak = jnp.max(lse, axis=2, keepdims=True)  # a token sees itself: it is finite
    weights = jnp.exp(lse - peak)
    total = jnp.sum(weights, axis=2)
    out = jnp.sum(out * weights[..., None], axis=2) / total[..., None]
    lse = peak[:, :, 0] + jnp.log(total)
    return out.reshape(B, H, T, D), lse.reshape(B, H, T), Ring(*after)


def _padded(x: Array, axis: int, size: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)


def _terms(x: Array, count: int) -> list[Array]:
    """bfloat16 arrays whose sum is x: exactly, where x has 8 bits of mantissa a term."""
    if count == 1:
        return [x.astype(jnp.bfloat16)]
    terms = []
    for _ in range(count):
        # Cut, not rounded by a cast: a compiler may take that and its inverse for nothing.
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        high = lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(high.astype(jnp.bfloat16))
        x = x - high
    return terms


def _scratch(plan: _Plan, ring: Ring, T: int) -> dict[str, Any]:
    D, kind = ring.k.shape[3], ring.k.dtype
    operand, scaled = _copied_as_operand(ring), ring.k_scale is not None

    def matrix(*shape: int) -> Any:
        """An operand of a matrix product. The two of one must have the same swizzle."""
        return _swizzled(shape, jnp.bfloat16, plgpu.find_swizzle(math.gcd(D, plan.tile) * 16))

    def held(*shape: int) -> Any:
        return matrix(*shape) if operand else plgpu.SMEM(shape, kind)

    def barriers(arrivals: int, count: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    out = _swizzled((ROWS, D), jnp.float32, plgpu.find_swizzle(D * 32))
    scratch = {
        "queries": matrix(plan.q_terms, ROWS, D),
        "weights": matrix(plan.q_terms, ROWS, plan.tile),
        "keys_or_out": plgpu.RefUnion(held(plan.stages, plan.tile, D), out),
        "values": held(plan.stages, plan.tile, D),
        "leaving": [plgpu.SMEM((T, _apart(ring), D), kind)] * 2,
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "keys_here": barriers(1 + scaled, plan.stages),
        "values_here": barriers(1 + scaled, plan.stages),
        "queries_here": barriers(plan.q_terms),
        "leaving_here": barriers(2 * T),
    }
    if not operand:
        scratch["operand"] = matrix(plan.k_terms, plan.tile, D)
    if scaled:
        scratch["scales"] = [plgpu.SMEM((plan.stages, plan.tile), jnp.float32)] * 2
    return scratch


def _copied_as_operand(ring: Ring) -> bool:
    """Whether a tile can be copied as the matrix product needs it, in eights of rows."""
    return ring.k.dtype == jnp.bfloat16 and ring.k.shape[2] % 8 == 0


def _apart(ring: Ring) -> int:
    """Tokens that a copy of one takes along: it begins and ends at multiples of 128 bytes."""
    size = ring.k.shape[3] * _bits(ring.k.dtype) // 8
    return 128 // math.gcd(128, size)


def _swizzled(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    transforms: Any = plgpu  # mypy takes its transforms for abstract classes
    tiling = transforms.TilingTransform((8, swizzle * 8 // _bits(dtype)))
    how = (tiling, transforms.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=how)


def _kernel(
    call: Call, plan: _Plan, G: int, T: int, two_sides: bool, scaled: bool, *refs: Any, **smem: Any
) -> None:
    """One block: the slots of its tiles, of one row and KV head; in the last split the new tokens
    too."""
    rule = call.rule
    S, W = rule.sinks, rule.window
    assert W is not None
    arrays = 4 if scaled else 2
    tick_ref, q_ref, *others, out_ref, lse_ref = refs
    new, slope_ref, ring = others[:arrays], others[arrays:-arrays], others[-arrays:]
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    D = q_ref.shape[-1]
    held, out_smem = smem["keys_or_out"]
    held = (held, smem["values"])

    ticks = tick_ref[row]
    filled = jnp.minimum(ticks, S + W)
    first = split * plan.share
    last = jnp.minimum(first + plan.share, lax.div(filled + (plan.tile - 1), plan.tile))
    old = jnp.maximum(last - first, 0)  # tiles of the ring; the new tokens are one more
    count = old + (split == plan.splits - 1).astype(jnp.int32)

    def fetch(i: Any, which: int) -> None:
        """Starts the copy of the keys (0) or the values (1) of the block's tile i."""
        stage = lax.rem(i, plan.stages)
        here = smem[("keys_here", "values_here")[which]].at[stage]

        def copy(arrays: Any, tile: Array) -> None:
            # What lies beyond an array's end comes as zeros.
            there = (row, head, pl.ds(tile * plan.tile, plan.tile))
            plgpu.copy_gmem_to_smem(arrays[which].at[there], held[which].at[stage], here)
            if scaled:
                target = smem["scales"][which].at[stage]
                plgpu.copy_gmem_to_smem(arrays[2 + which].at[there], target, here)

        pl.when(i < old)(lambda: copy(ring, first + i))
        pl.when(i == old)(lambda: copy(new, i - old))

    for i in range(plan.q_terms):
        target = smem["queries"].at[i, pl.ds(0, plan.rows)]
        plgpu.copy_gmem_to_smem(q_ref.at[i, row, head], target, smem["queries_here"])
    for i in range(plan.stages):
        for which in range(2):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i), which))
    for which in range(2):
        for t in range(T):
            target = smem["leaving"][which].at[t]
            there = (row, head, pl.ds(t, target.shape[0]))
            plgpu.copy_gmem_to_smem(new[which].at[there], target, smem["leaving_here"])

    r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    at_sinks = r >= G * T
    step = lax.rem(jnp.where(at_sinks, r - G * T, r), T)
    slopes = None
    if slope_ref:
        layout = plgpu.Layout.WGMMA.reduce(1)
        slopes = plgpu.load(slope_ref[0].at[head], layout=layout, optimized=False)

    def masked(scores: Array, back: Array, sink: Array, there: Array) -> Array:
        """What a query sees: −inf elsewhere; with ALiBi.

        Args:
            back: how far a key lies behind the first new token.
            sink: whether it is one.
            there: whether there is a key at all.
        """
        n = scores.shape[1]
        if slopes is not None:
            apart = _across(step, n)
            if S:
                # A sink seems to lie right before the window.
                young = jnp.minimum(step, S + W - 1 - ticks)
                apart = jnp.where(_down(sink, ROWS), _across(young, n), apart)
            apart += _down(back, ROWS)
            scores -= _across(slopes, n) * apart.astype(jnp.float32)
        alike = T == 1 and not two_sides  # then all rows see the same keys
        if not alike:
            back, sink, there = (_down(x, ROWS) for x in (back, sink, there))
            back += _across(step, n)
        seen = there & (back >= 0) & ((back < W) | sink)
        if two_sides:
            seen &= _across(at_sinks, n) == sink
        hidden = jnp.where(seen, 0.0, -jnp.inf)
        return scores + (_down(hidden, ROWS) if alike else hidden)

    cursor = lax.rem(jnp.maximum(ticks - 1 - S, 0), W)  # the newest token's place in the window

    def attend(i, carry):
        """Takes tile i into the running softmax."""
        peak, total, out = carry
        stage = lax.rem(i, plan.stages)

        def done(which: int) -> None:
            @pl.when(i + plan.stages < count)
            def _():
                fetch(i + plan.stages, which)

        def scales(which: int) -> Array:
            # Like every read by the threads of what a copy overwrites: before a `commit_smem`.
            ref = smem["scales"][which].at[stage]
            x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            return _down(x, ROWS)

        plgpu.barrier_wait(smem["keys_here"].at[stage])
        k_scale = scales(0) if scaled else None
        keys = _operand(held[0].at[stage], smem.get("operand"), plan.k_terms)
        keys = [x.transpose((1, 0)) for x in keys]
        queries = [smem["queries"].at[j] for j in range(plan.q_terms)]
        scores = _product(queries, keys, plan.tile)
        scores *= rule.scale * LOG2E if rule.soft_cap is None else rule.scale / rule.soft_cap
        if k_scale is not None:
            scores *= k_scale
        done(0)
        if rule.soft_cap is not None:
            # tanh, to full precision: the hardware's own has 11 bits.
            tanh = 1 - 2 / (1 + jnp.exp2(scores * (2 * LOG2E)))
            scores = rule.soft_cap * LOG2E * tanh

        u = plgpu.broadcasted_iota(jnp.int32, (plan.tile,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
        # Where a slot's tick is its index, as a sink's, and where it follows from its age: new
        # tokens are like the former, from slot `ticks` on.
        start = (first + i) * plan.tile
        own = i == old
        known = jnp.where(own, jnp.iinfo(jnp.int32).max, S)
        slots = jnp.where(own, ticks, start) + u
        age = cursor - (slots - S)
        age = jnp.where(age < 0, age + W, age)
        scores = masked(
            scores,
            back=jnp.where(slots < known, ticks - slots, age + 1),
            sink=slots < S,
            there=u < jnp.where(own, T, filled - start),
        )

        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        shares = jnp.exp2(scores - _across(base, plan.tile))
        shrink = jnp.exp2(peak - base)
        total = total * shrink + jnp.sum(shares, axis=1)
        plgpu.barrier_wait(smem["values_here"].at[stage])
        if scaled:
            shares *= scales(1)
        weights = smem["weights"]
        for j, term in enumerate(_terms(shares, plan.q_terms)):
            weights[j] = term
        plgpu.commit_smem()
        values = _operand(held[1].at[stage], smem.get("operand"), plan.k_terms)
        added = _product([weights.at[j] for j in range(plan.q_terms)], values, D)
        done(1)
        return new_peak, total, out * _across(shrink, D) + added

    plgpu.barrier_wait(smem["queries_here"])
    layout = plgpu.Layout.WGMMA
    carry = (
        plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), layout.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), layout),
    )
    peak, total, out = lax.fori_loop(0, count, attend, carry)

    some = total > 0
    total = jnp.where(some, total, 1.0)
    out_smem[...] = out / _across(total, D)
    lse = peak / LOG2E + jnp.log(total)
    smem["lse"][...] = jnp.where(some, lse, -jnp.inf)
    plgpu.commit_smem()
    here = (row, head, split)
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, plan.rows)], out_ref.at[here])
    plgpu.copy_smem_to_gmem(smem["lse"].at[pl.ds(0, plan.rows)], lse_ref.at[here])

    plgpu.barrier_wait(smem["leaving_here"])

    def write(t: int, slot: Array) -> None:
        for which in range(2):
            source = smem["leaving"][which].at[t, 0]
            plgpu.copy_smem_to_gmem(source, ring[which].at[row, head, slot])
            if scaled:
                ring[2 + which][row, head, slot] = new[2 + which][row, head, t]

    for t in range(T):
        slot = slot_of(ticks + t, S, W)
        mine = lax.div(slot, plan.tile * plan.share) == split
        pl.when(mine)(functools.partial(write, t, slot))
    plgpu.wait_smem_to_gmem(0)


def _down(x: Array, rows: int) -> Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def _across(x: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _operand(tile: Any, room: Any, terms: int) -> list[Any]:
    """A tile as operands of the matrix product whose sum it is."""
    if room is None:
        return [tile]
    swizzle = plgpu.find_swizzle(math.gcd(*tile.shape) * 16)
    layout = plgpu.Layout.SMEM_GMEM_COPY(tile.shape, jnp.bfloat16, swizzle)
    whole = plgpu.load(tile, layout=layout, optimized=False)
    for i, term in enumerate(_terms(whole, terms)):
        room[i] = term
    plgpu.commit_smem()
    return [room.at[i] for i in range(terms)]


def _product(a: list[Any], b: list[Any], columns: int) -> Array:
    """Sum of the products of terms, but for those that float32 could not hold."""

    def run(sums: Any) -> Array:
        for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
            if i + j < 3:
                plgpu.wgmma(sums, x, y)
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))
