"""Which tiles a Mosaic GPU kernel visits, and what a query sees of them: prepared by XLA.

A kernel makes one or two *sweeps* over the keys. In a sweep each query sees the ticks of an
interval, or of either of two. The order of keys does not matter to a softmax, so the tiles of which
all is visible come first, and those that need a mask after them: two loops, no branch.

Two sweeps are made where sinks count otherwise than the rest: under their own queries (`q_sinks`)
or at ALiBi's distances. The first sweep leaves them out, the second sees nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.rule import EMPTY, Rule, blocked

if TYPE_CHECKING:
    from jaxtyping import Int32

ROWS = 64  # of a tile that a warpgroup takes: the M of wgmma


class Sweep(NamedTuple):
    """What queries see, `[B, T]` each.

    Attributes:
        bounds: (first, last) tick; one or two intervals.
        seat: ALiBi's distance to a key is this less the key's tick; None: no ALiBi.
    """

    bounds: list[tuple[Int32[Array, "B T"], Int32[Array, "B T"]]]
    seat: Int32[Array, "B T"] | None


class Visits(NamedTuple):
    """The tiles that each tile has to meet.

    Attributes:
        order: their indices, those wholly visible first. Bb is 1 or B; Hb is 1, Hkv or H.
        full: how many are wholly visible.
        all: how many there are.
    """

    order: Int32[Array, "Bb Hb N most"]
    full: Int32[Array, "Bb Hb N"]
    all: Int32[Array, "Bb Hb N"]

    def at(self, row, head, heads: int, tile):
        """Of a kernel's references, the list of one tile: index n of it, and both counts."""
        batch, of_heads = self.order.shape[:2]
        where = (row if batch > 1 else 0, lax.div(head, heads // of_heads), tile)
        return (lambda n: self.order[(*where, n)]), self.full[where], self.all[where]


class Problem:
    """A call cut into tiles, its lengths and head_dim filled up to whole ones.

    Attributes:
        x: the inputs; `queries`: those of each sweep.
        k_ticks: `[B, K]`; the sweeps hold what else of `Places` counts.
        tiles_q, tiles_k: how many there are of `tile_q` queries and `tile_k` keys.
        warpgroups: that compute, in a kernel over queries and in one over keys.
    """

    def __init__(self, call: Call, x: Inputs, places: Places, *, tile_q: int, tile_k: int):
        self.call, self.rule, self.interpret = call, call.rule, call.interpret
        self.tile_q, self.tile_k = tile_q, tile_k
        tiles = dict(q=tile_q, k=tile_k, v=tile_k, q_sinks=tile_q)
        arrays = {name: getattr(x, name) for name in tiles}
        self.x = x = Inputs(
            **{
                name: None
                if a is None
                else filled(filled(a, 2, tiles[name]), 3, 64 if a.shape[3] <= 64 else 128)
                for name, a in arrays.items()
            }
        )
        self.B, self.H, self.T, self.head_dim = x.q.shape
        self.Hkv, self.K = x.k.shape[1:3]
        self.group = self.H // self.Hkv
        self.tiles_q, self.tiles_k = self.T // tile_q, self.K // tile_k
        self.k_ticks = filled(places.k_ticks, 1, tile_k, EMPTY)
        places = places._replace(
            q_ticks=filled(places.q_ticks, 1, tile_q, EMPTY),
            q_starts=filled(places.q_starts, 1, tile_q),
        )
        self.sweeps = _sweeps(call.rule, x, places)
        far = x.q if x.q_sinks is None else x.q_sinks
        self.queries = [x.q, far][: len(self.sweeps)]
        blocks = jnp.repeat(places.blocks, call.block_q // tile_q, axis=2)
        blocks = jnp.repeat(blocks, call.block_k // tile_k, axis=3)
        self.blocks = blocks[:, :, : self.tiles_q, : self.tiles_k]

    def visits(self, *, by_key: bool = False) -> list[Visits]:
        """For each sweep, which tiles of keys each tile of queries meets; or, `by_key`, the
        reverse."""
        return [self._visits(sweep, by_key) for sweep in self.sweeps]

    def _visits(self, sweep: Sweep, by_key: bool) -> Visits:
        some, every = _sight(sweep, self.k_ticks, self.tile_q, self.tile_k)
        some = self.blocks & some[:, None]
        every = some & every[:, None]
        most = self.call.most * (self.call.block_k // self.tile_k)
        if by_key:
            some, every, most = some.swapaxes(2, 3), every.swapaxes(2, 3), self.tiles_q
        rank = jnp.where(every, 0, jnp.where(some, 1, 2)).astype(jnp.int8)
        order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
        counts = [jnp.sum(a, axis=-1, dtype=jnp.int32) for a in (every, some)]
        return Visits(order[..., : min(most, order.shape[-1])], *counts)


def _sweeps(rule: Rule, x: Inputs, places: Places) -> list[Sweep]:
    """One, or all but the sinks and then the sinks."""
    q, start = places.q_ticks, places.q_starts
    sinks = rule.sinks
    if rule.window is None and x.q_sinks is None:
        sinks = 0  # nothing tells them from the rest
    first = start + sinks
    if rule.window is not None:
        first = jnp.maximum(first, q - rule.window + 1)
    near = Sweep([(first, q)], None if places.slopes is None else q)
    if not sinks:
        return [near]
    at_sinks = (start, jnp.minimum(start + sinks - 1, q))
    if x.q_sinks is None and places.slopes is None:
        return [Sweep([*near.bounds, at_sinks], None)]
    seat = None
    if places.slopes is not None:
        seat = q
        if rule.window is not None:
            seat = start + jnp.minimum(q - start, sinks + rule.window - 1)
    return [near, Sweep([at_sinks], seat)]


def _sight(sweep: Sweep, k_ticks: Array, tile_q: int, tile_k: int) -> tuple[Array, Array]:
    """Tile by tile, `[B, Nq, Nk]`: whether anything is seen (never false where something is), and
    whether all is (never true where something is not)."""
    held = jnp.where(k_ticks == EMPTY, jnp.iinfo(jnp.int32).max, k_ticks)
    k_first = blocked(held, tile_k, jnp.min)[:, None]
    k_least = blocked(k_ticks, tile_k, jnp.min)[:, None]
    k_last = blocked(k_ticks, tile_k, jnp.max)[:, None]
    some = every = jnp.zeros((), bool)
    for first, last in sweep.bounds:
        firsts = [blocked(first, tile_q, f)[:, :, None] for f in (jnp.min, jnp.max)]
        lasts = [blocked(last, tile_q, f)[:, :, None] for f in (jnp.min, jnp.max)]
        some |= (k_last >= firsts[0]) & (k_first <= lasts[1])
        every |= (k_least >= firsts[1]) & (k_last <= lasts[0])
    # A slope asks for the ticks of every tile, so every tile goes where ticks are read.
    return some, every if sweep.seat is None else jnp.zeros_like(every)


def filled(a: Array, axis: int, block: int, value=0) -> Array:
    """Filled up to whole blocks along an axis. No copy where it fits."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % block)
    return jnp.pad(a, widths, constant_values=value) if widths[axis][1] else a


def warpgroups_of(block: int) -> int:
    """How many warpgroups share a tile of rows: one waits while another computes."""
    return 2 if block % (2 * ROWS) == 0 else 1
