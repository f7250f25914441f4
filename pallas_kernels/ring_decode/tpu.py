"""The op as one Mosaic kernel: each block of slots is read once, and of the ring only the aligned
tiles around the new tokens are written, in place.

A program takes one row and a group of its KV heads (all, where they fit), and walks over the blocks
of slots that hold something. The block with the slot of the first new token comes last, so that the
tile to write is cut from what lies in VMEM already. The new tokens are attended to from their own
arrays; whatever the ring holds in their slots is out of the window, and masked.

XLA lays an array out so that it pads least: where a head is no multiple of 128 wide, that is with
the slots, not the head, along the lanes. The kernel takes such rings *turned*, `[B, Hkv, D, C]`,
which is how they lie; the other way round each step would copy them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.rule import EMPTY, Rule, distance, slot_of, visible
from pallas_kernels.ring import Ring
from pallas_kernels.ring_decode.call import Call

HEAD_DIMS = (64, 80, 96, 128, 256)
MOST_TOKENS = 8  # as many consecutive slots lie in two tiles of any dtype
LANES = 128
SUBLANES = 8
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
# Rows, groups of heads, steps.
SEMANTICS: Sequence[Literal["parallel", "arbitrary"]] = ("parallel", "parallel", "arbitrary")
# Keys in a block. Keys and values, each twice, take a quarter of the 16 MiB of v5e; what they are
# turned into in order to be multiplied takes as much again. At 1 MiB a copy lasts for more than a
# microsecond even at 3.7 TB/s, some three times what a step of the grid costs by itself.
BLOCK_BYTES = 1 << 20


def refuses(
    call: Call,
    q: Array,
    q_sinks: Array | None,
    new: Ring,
    ring: Ring,
    ticks: Array,
    slopes: Array | None,
) -> str | None:
    """Why this backend can't serve a call of `decode`; None where it can."""
    T, D = q.shape[2:]
    if D not in HEAD_DIMS:
        return f"head_dim {D}: expected one of {', '.join(map(str, HEAD_DIMS))}"
    if T > MOST_TOKENS:
        return f"{T} new tokens: expected at most {MOST_TOKENS}"
    if q.dtype.name not in ("bfloat16", "float32"):
        return f"queries of {q.dtype.name}: expected bfloat16 or float32"
    if ring.k.dtype.name not in BITS:
        return f"a ring of {ring.k.dtype.name}: expected one of {', '.join(BITS)}"
    if call.block_size is not None and (call.block_size < 1 or call.block_size % LANES):
        return f"block_size {call.block_size}: expected a multiple of {LANES}"
    heads, block = sizes(call, ring, q)
    if heads * block * _bytes_of_slot(ring, q) > 2 * BLOCK_BYTES:
        return (
            f"{heads} KV heads of {D} {ring.k.dtype.name} in blocks of {block}: too much for VMEM"
        )
    C = ring.k.shape[2]
    if block < C < block + T:
        return f"{C} slots in blocks of {block}: a last block shorter than the {T} new tokens"
    return None


def sizes(call: Call, ring: Ring, q: Array) -> tuple[int, int]:
    """KV heads and slots that a program takes at a time."""
    Hkv, C = ring.k.shape[1:3]
    slot = _bytes_of_slot(ring, q)
    # A group of heads is all of them, or else whole tiles of the scales.
    groups = [Hkv, *(n for n in range(Hkv - 1, 0, -1) if Hkv % n == 0 and n % SUBLANES == 0)]
    fitting = (n for n in groups if n * slot * LANES <= BLOCK_BYTES)
    heads = next(fitting, groups[-1])
    if call.block_size is not None:
        return heads, call.block_size
    most = max(BLOCK_BYTES // (heads * slot * LANES), 1) * LANES
    count = pl.cdiv(C, most)
    return heads, pl.cdiv(pl.cdiv(C, count), LANES) * LANES


def _bytes_of_slot(ring: Ring, q: Array) -> int:
    """Of the keys of one head in VMEM, as they come; or half of what they are multiplied as."""
    D, bits = ring.k.shape[3], BITS[ring.k.dtype.name]
    tile = SUBLANES * 32 // bits if turned(ring) else LANES
    return pl.cdiv(D, tile) * tile * max(bits, BITS[q.dtype.name] // 2) // 8


def turned(ring: Ring) -> bool:
    return ring.k.shape[3] % LANES != 0


class Walk(NamedTuple):
    """What a row does at its steps: one for each block of slots, of which the last writes the
    tile of a first token, and one more for each further tile."""

    rule: Rule
    tokens: int
    capacity: int
    block: int
    turned: bool = False  # how keys and values lie

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.capacity, self.block)

    @property
    def writes(self) -> int:
        return min(self.tokens, 4)

    @property
    def steps(self) -> int:
        return self.blocks + self.writes - 1

    def slot(self, tick, token):
        return slot_of(tick + token, self.rule.sinks, self.rule.window)

    def token(self, tick, step):
        """The new token whose tile is written at a step."""
        turn = jnp.maximum(step - (self.blocks - 1), 0)
        if self.tokens <= self.writes:
            return turn
        # The tokens lie in one run of slots, or in two where the ring begins anew. The first and
        # the last of a run name the two tiles that it can touch.
        last = self.tokens - 1
        wrap = self.capacity - self.slot(tick, 0)
        middle = jnp.minimum(wrap + turn - 2, last)
        return jnp.where(turn == 0, 0, jnp.where(turn == 3, last, middle))

    def tile(self, tick, step, size: int):
        """The tile of so many slots that is written at a step."""
        return jax.lax.div(self.slot(tick, self.token(tick, step)), size)

    def idle(self, tick):
        """The steps before the first that reads: slots that hold nothing are left out."""
        held = jnp.minimum(tick + self.tokens, self.capacity)
        return self.blocks - jax.lax.div(held + (self.block - 1), self.block)

    def at(self, tick, step):
        """The block of slots at a step."""
        idle = self.idle(tick)
        home = jax.lax.div(self.slot(tick, self.token(tick, step)), self.block)
        turn = jnp.clip(step, idle, self.blocks - 1) - idle
        return jax.lax.rem(home + 1 + turn, self.blocks - idle)

    def held(self, tick, slots):
        """The ticks of what slots hold: `rule.ring_ticks` without a division for every slot."""
        sinks, window = self.rule.sinks, self.rule.window
        last = tick - 1
        behind = slot_of(last, sinks, window) - slots
        held = last - jnp.where(behind < 0, behind + window, behind)
        held = jnp.where(held >= sinks, held, EMPTY)
        return jnp.where(slots < sinks, jnp.where(slots <= last, slots, EMPTY), held)


def decode(
    call: Call,
    q: Array,
    q_sinks: Array | None,
    new: Ring,
    ring: Ring,
    ticks: Array,
    slopes: Array | None,
) -> tuple[Array, Array, Ring]:
    """See `reference.decode`."""
    B, H, T, D = q.shape
    Hkv, C = ring.k.shape[1:3]
    G = H // Hkv
    heads, block = sizes(call, ring, q)
    walk = Walk(call.rule, T, C, block, turned(ring))

    def rows(x: Array) -> Array:
        """`[B, H, T, D]` as `[B, Hkv, T · G, D]`: the rows that meet the same keys."""
        return x.reshape(B, Hkv, G, T, -1).swapaxes(2, 3).reshape(B, Hkv, T * G, -1)

    def by_head(x: Array) -> Array:
        return x.reshape(B, Hkv, T, G, -1).swapaxes(2, 3).reshape(B, H, T, -1)

    def whole(x) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, *x.shape[2:]), lambda b, h, j, ticks: (b, h, 0, 0))

    def part(x, slots: int, place) -> pl.BlockSpec:
        """So many slots of a ring's array, at a place that follows from tick and step."""
        axis = _slot_axis(walk, x)

        def index(b, h, j, ticks):
            at = place(ticks[b], j)
            return (b, h, *(at if i == axis else 0 for i in range(2, x.ndim)))

        shape = (slots if i == axis else n for i, n in enumerate(x.shape[2:], 2))
        return pl.BlockSpec((1, heads, *shape), index)

    def block_of(x) -> pl.BlockSpec:
        return part(x, block, walk.at)

    def tile_of(x) -> pl.BlockSpec:
        size = _tile(walk, x)
        return part(x, size, lambda tick, step: walk.tile(tick, step, size))

    def turn(x: Array) -> Array:
        return x.swapaxes(2, 3) if walk.turned and x.ndim == 4 else x

    held = {name: turn(x) for name, x in ring._asdict().items() if x is not None}
    if call.interpret is None:
        # XLA else moves rings that fit to its own part of VMEM, whole, and back.
        held = {n: pltpu.with_memory_space_constraint(x, pltpu.HBM) for n, x in held.items()}
    else:
        held = {name: _padded(walk, x) for name, x in held.items()}
    small = {"q": rows(q), "new_k": new.k.astype(jnp.float32), "new_v": new.v.astype(jnp.float32)}
    if q_sinks is not None and call.rule.sinks:
        small["q_sinks"] = rows(q_sinks)
    if slopes is not None:
        small["slopes"] = rows(jnp.broadcast_to(slopes[:, None, None], (B, H, T, 1)))
    if new.k_scale is not None:
        small["new_k_scale"] = new.k_scale[..., None]
        small["new_v_scale"] = new.v_scale[..., None]
    results = {
        "out": jax.ShapeDtypeStruct((B, Hkv, T * G, D), jnp.float32),
        "lse": jax.ShapeDtypeStruct((B, Hkv, T * G, 1), jnp.float32),
    }
    after = {f"{name}_after": jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in held.items()}
    scratch = {
        "peak": pltpu.VMEM((heads, T * G, 1), jnp.float32),
        "total": pltpu.VMEM((heads, T * G, 1), jnp.float32),
        "sum": pltpu.VMEM((heads, T * G, D), jnp.float32),
    }
    names = (*small, *held, *results, *after, *scratch)

    def kernel(ticks, *refs):
        _kernel(walk, ticks[pl.program_id(0)], dict(zip(names, refs, strict=True)))

    out, lse, *written = pl.pallas_call(
        kernel,
        out_shape=[*results.values(), *after.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, Hkv // heads, walk.steps),
            in_specs=[*map(whole, small.values()), *map(block_of, held.values())],
            out_specs=[*map(whole, results.values()), *map(tile_of, after.values())],
            scratch_shapes=list(scratch.values()),
        ),
        input_output_aliases={
            1 + len(small) + i: len(results) + i for i in range(len(held))
        },  # 1: ticks
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        cost_estimate=_cost(
            walk, [*small.values(), *results.values()], list(held.values()), H * T * D
        ),
        interpret=False if call.interpret is None else call.interpret,
        name="ring_decode",
    )(ticks, *small.values(), *held.values())
    return by_head(out), by_head(lse)[..., 0], Ring(*(turn(x)[:, :, :C] for x in written))


def _slot_axis(walk: Walk, x) -> int:
    return 3 if walk.turned and x.ndim == 4 else 2


def _padded(walk: Walk, x: Array) -> Array:
    """With whole blocks of slots. The interpreter pads an input so, and then trips over the output
    that is aliased to it and is not padded; hardware is handed the ring as it is."""
    beyond = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1
    pad = [(0, 0)] * x.ndim
    pad[_slot_axis(walk, x)] = (0, -walk.capacity % walk.block)
    return jnp.pad(x, pad, constant_values=beyond)


def _tile(walk: Walk, x) -> int:
    """Slots in a tile of a ring's array: the least that can be written."""
    along_lanes = _slot_axis(walk, x) == x.ndim - 1
    return LANES if along_lanes else SUBLANES * 32 // BITS[x.dtype.name]


def _cost(walk: Walk, small: list, held: list[Array], queries: int) -> pl.CostEstimate:
    """Of rings that are full: each slot read once, the tiles written.

    Args:
        queries: numbers in those of one row.
    """

    def size(x) -> int:
        return x.size * BITS[x.dtype.name] // 8

    tiles = sum(size(x) * walk.writes * _tile(walk, x) // walk.capacity for x in held)
    B, D = small[0].shape[0], small[0].shape[-1]
    return pl.CostEstimate(
        flops=4 * B * queries * walk.capacity,
        transcendentals=B * queries * walk.capacity // D,
        bytes_accessed=sum(map(size, [*small, *held])) + tiles,
    )


def _kernel(walk: Walk, tick: Array, refs: dict) -> None:
    """One step of one row: `refs` by the names that `decode` gives."""
    rule = walk.rule
    step = pl.program_id(2)
    at = walk.at(tick, step)

    @pl.when(step == 0)
    def _():
        _start(walk, tick, refs)

    reads = (step >= walk.idle(tick)) & (step < walk.blocks)
    if "q_sinks" in refs:
        near = at * walk.block >= rule.sinks

        @pl.when(reads & ~near)
        def _():
            _attend(walk, tick, at, refs, with_sinks=True)

        reads &= near

    @pl.when(reads)
    def _():
        _attend(walk, tick, at, refs, with_sinks=False)

    @pl.when(step == walk.blocks - 1)
    def _():
        refs["out"][0] = refs["sum"][...] / refs["total"][...]
        refs["lse"][0] = refs["peak"][...] + jnp.log(refs["total"][...])

    @pl.when(step >= walk.blocks - 1)
    def _():
        for name in Ring._fields:
            if name in refs:
                _write(walk, tick, step, at, refs[name], refs[f"new_{name}"], refs[f"{name}_after"])


def _q_ticks(walk: Walk, tick: Array, rows: int) -> Array:
    """`[T · G, 1]`, token by token."""
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    group = rows // walk.tokens
    return tick + sum((row >= t * group).astype(jnp.int32) for t in range(1, walk.tokens))


def _finished(rule: Rule, scores: Array, q_ticks: Array, k_ticks: Array, refs: dict) -> Array:
    """Products `[Hkv, T · G, K]` as scores; −inf where a key is hidden."""
    starts = jnp.zeros_like(q_ticks)
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    if "slopes" in refs:
        far = distance(rule, q_ticks, k_ticks, starts).astype(jnp.float32)
        scores -= refs["slopes"][0] * far[None]
    seen = visible(rule, q_ticks, k_ticks, starts)
    return jnp.where(seen[None], scores, -jnp.inf)


def _start(walk: Walk, tick: Array, refs: dict) -> None:
    """The softmax over the new tokens among themselves. Each sees itself, so no peak is −inf."""
    rule = walk.rule
    q = refs["q"][0].astype(jnp.float32)
    q_ticks = _q_ticks(walk, tick, q.shape[1])
    scores = []
    for t in range(walk.tokens):
        k = refs["new_k"][0, :, t : t + 1]
        product = jnp.sum(q * k, axis=-1, keepdims=True)
        if "q_sinks" in refs:
            far = jnp.sum(refs["q_sinks"][0].astype(jnp.float32) * k, axis=-1, keepdims=True)
            product = jnp.where(tick + t < rule.sinks, far, product)
        product *= rule.scale
        if "new_k_scale" in refs:
            product *= refs["new_k_scale"][0, :, t : t + 1]
        scores.append(_finished(rule, product, q_ticks, tick + t, refs))
    peak = scores[0]
    for s in scores[1:]:
        peak = jnp.maximum(peak, s)
    refs["peak"][...] = peak
    total, values = jnp.zeros_like(peak), jnp.zeros_like(q)
    for t, s in enumerate(scores):
        weight = jnp.exp(s - peak)
        total += weight
        if "new_v_scale" in refs:
            weight *= refs["new_v_scale"][0, :, t : t + 1]
        values += weight * refs["new_v"][0, :, t : t + 1]
    refs["total"][...] = total
    refs["sum"][...] = values


def _dot(spec: str, a: Array, b: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)


def _attend(walk: Walk, tick: Array, at: Array, refs: dict, *, with_sinks: bool) -> None:
    """Takes one block of slots into the softmax."""
    rule, block = walk.rule, walk.block
    slots = at * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    inside = slots < walk.capacity
    k_ticks = jnp.where(inside, walk.held(tick, slots), EMPTY)

    q = refs["q"][0]
    k = refs["k"][0].astype(q.dtype)
    keys = "hdc" if walk.turned else "hcd"
    scores = _dot(f"hrd,{keys}->hrc", q, k)
    if with_sinks:
        far = _dot(f"hrd,{keys}->hrc", refs["q_sinks"][0], k)
        scores = jnp.where((slots < rule.sinks)[None], far, scores)
    scores *= rule.scale
    if "k_scale" in refs:
        scores *= refs["k_scale"][0][:, None]
    scores = _finished(rule, scores, _q_ticks(walk, tick, q.shape[1]), k_ticks, refs)

    peak = jnp.maximum(refs["peak"][...], jnp.max(scores, axis=-1, keepdims=True))
    fade = jnp.exp(refs["peak"][...] - peak)
    weights = jnp.exp(scores - peak)
    refs["peak"][...] = peak
    refs["total"][...] = refs["total"][...] * fade + jnp.sum(weights, axis=-1, keepdims=True)

    v = refs["v"][0]
    kind = jnp.float32 if jnp.float32 in (q.dtype, v.dtype) else jnp.bfloat16
    v = v.astype(kind)
    beyond = walk.capacity % block != 0  # what lies there may be NaN
    if "v_scale" in refs:
        v_scale = refs["v_scale"][0]
        if beyond:
            v_scale = jnp.where(inside, v_scale, 0.0)
        weights *= v_scale[:, None]
    if beyond:
        axis = _slot_axis(walk, refs["v"]) - 1
        slot = at * block + jax.lax.broadcasted_iota(jnp.int32, v.shape, axis)
        v = jnp.where(slot < walk.capacity, v, jnp.zeros_like(v))
    values = _dot(f"hrc,{keys}->hrd", weights.astype(kind), v)
    refs["sum"][...] = refs["sum"][...] * fade + values


def _write(walk: Walk, tick, step, at, old, new, after) -> None:
    """Fills the tile to write: what the ring holds there, and all new tokens that belong there."""
    size, axis = _tile(walk, after), _slot_axis(walk, after)
    first = walk.tile(tick, step, size) * size
    offset = pl.multiple_of(first - at * walk.block, size)
    cut = pl.ds(offset, size)
    tile = old[0, :, :, cut] if axis == 3 else old[0, :, cut]
    # Integers are chosen from as 32 bits: a choice of packed ones is not for every chip.
    whole = jnp.issubdtype(after.dtype, jnp.integer)
    x = tile.astype(jnp.int32) if whole else tile
    slots = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis - 1)
    for t in range(walk.tokens):
        token = new[0, :, t] if after.ndim == 3 else new[0, :, t : t + 1]
        if axis == 3:
            token = _column(token)
        x = jnp.where(slots == walk.slot(tick, t), token.astype(x.dtype), x)
    after[0] = x.astype(after.dtype)


def _column(row: Array) -> Array:
    """`[Hkv, 1, D]` as `[Hkv, D, 1]`, bit for bit. (In HBM that would be padded to whole lanes.)"""
    D = row.shape[2]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (D, D), axis) for axis in (0, 1))
    return jnp.max(jnp.where((i == j)[None], row, -jnp.inf), axis=-1, keepdims=True)
