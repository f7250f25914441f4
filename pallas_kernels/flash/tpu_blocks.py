"""What the Mosaic TPU kernels of the attention core share: how they cut the arrays, what a program
is handed, and the scores of a block.

Scores lie with keys along sublanes and queries along lanes. Then the softmax statistics of a block
of queries are a row (a register or two, where a column takes a register every eight queries), its
reductions are adds of whole registers, and the two products of the key gradients need no transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.pairs import FAR, NEAR, Bound, inner_of, outer_of
from pallas_kernels.flash.rule import EMPTY, Rule, distance, is_sink, visible

LANES = 128

MOST_HEADS = 8  # of one program: its code has a copy of each step a head


class Cut(NamedTuple):
    """How a call is cut up. Static.

    Attributes:
        heads, kv_heads: query and KV heads that one program takes; they share its block list.
        front: the first keys of a block, among which its sinks lie.
        turned: keys and values come as `[B, Hkv, D, K]`.
    """

    B: int
    H: int
    Hkv: int
    T: int
    K: int
    D: int
    block_q: int
    block_k: int
    heads: int
    kv_heads: int
    front: int
    turned: bool

    @property
    def count_q(self) -> int:
        return -(-self.T // self.block_q)

    @property
    def count_k(self) -> int:
        return -(-self.K // self.block_k)

    @property
    def programs(self) -> int:
        return self.H // self.heads

    @property
    def group(self) -> int:
        """Query heads of a program that share a KV head."""
        return self.heads // self.kv_heads


def cut(call: Call, x: Inputs, places: Places, room: int) -> Cut:
    """Takes as many heads a program as fit: they share the mask and the cost of a grid step.

    Args:
        room: bytes of VMEM for one block of queries, or of keys, of all heads of a program.
    """
    B, H, T, D = x.q.shape
    Hkv, K = x.k.shape[1:3]
    block_q, block_k = min(call.block_q, T), min(call.block_k, K)
    lanes = -(-D // LANES) * LANES
    most = min(MOST_HEADS, max(1, room // (max(block_q, block_k) * lanes * x.q.dtype.itemsize)))
    lists = places.blocks.shape[1]
    group = 1 if lists not in (1, Hkv) else _divisor(H // Hkv, most)
    kv_heads = 1
    if lists == 1 and group == H // Hkv:
        # A chip of two cores shares out the programs: there are to be two at least.
        kv_heads = _divisor(Hkv, max(1, min(most // group, Hkv if B > 1 else Hkv // 2)))
    tile = {"int8": 32, "int4": 64}.get(x.k.dtype.name, 16)
    sinks = -(-call.rule.sinks // tile) * tile
    front = min(block_k, sinks) if call.sinks_first else block_k
    # A ring whose heads are no whole lanes lies so (see `ring_decode/tpu.py`).
    turned = x.k_scale is not None and D % LANES != 0
    return Cut(B, H, Hkv, T, K, D, block_q, block_k, group * kv_heads, kv_heads, front, turned)


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


def bound_of(call: Call, c: Cut) -> Bound:
    if call.bound is not None:
        return call.bound
    return Bound(c.count_q * call.most, 0, 0 if call.most else c.count_q)


class Where(NamedTuple):
    """`Places`, laid out by block.

    Attributes:
        queries: int32 `[B, Nq, 2, block_q]`: ticks and starts.
        keys: int32 `[B, Nk, 1, block_k]`: ticks.
        slopes: float32 `[H]`, or None.
    """

    queries: Any
    keys: Any
    slopes: Any


def where_of(c: Cut, places: Places) -> Where:
    """Beyond the end lie queries that see nothing and keys that nobody sees."""
    queries = jnp.stack(
        [
            by_block(places.q_ticks, c.block_q, EMPTY - 1),
            by_block(places.q_starts, c.block_q, 0),
        ],
        axis=2,
    )
    keys = by_block(places.k_ticks, c.block_k, EMPTY)[:, :, None]
    return Where(queries, keys, places.slopes)


def by_block(x: Array, block: int, fill) -> Array:
    """`[..., T]` to `[..., N, block]`."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)], constant_values=fill)
    return x.reshape(*x.shape[:-1], -1, block)


class Grid(NamedTuple):
    """The grid (rows, head programs, pairs), and which block of each array a step takes.

    Attributes:
        lists, rows: how many block lists there are for the heads of a row, and for how many rows.
        size: of a list.
        inner_keys: the pairs are ordered by query block; else by key block.
    """

    cut: Cut
    lists: int
    rows: int
    size: int
    inner_keys: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.cut.B, self.cut.programs, self.size

    def word(self, words, b, h, p) -> Array:
        """The pair of a step. The lists lie one after the other in scalar memory."""
        c = self.cut
        at = _part(h, c.programs, self.lists)
        if self.rows > 1:
            at = at + b * self.lists
        return words[at * self.size + p]

    def query_block(self, word) -> Array:
        return outer_of(word) if self.inner_keys else inner_of(word)

    def key_block(self, word) -> Array:
        return inner_of(word) if self.inner_keys else outer_of(word)

    def _spec(self, shape: tuple[int, ...], index) -> pl.BlockSpec:
        def index_map(b, h, p, words):
            word = self.word(words, b, h, p)
            return index(b, h, self.query_block(word), self.key_block(word))

        return pl.BlockSpec(shape, index_map)

    def queries(self) -> pl.BlockSpec:
        """Of `[B, H, T, D]`."""
        c = self.cut
        return self._spec((1, c.heads, c.block_q, c.D), lambda b, h, i, j: (b, h, i, 0))

    def keys(self) -> pl.BlockSpec:
        """Of `[B, Hkv, K, D]`, or turned."""
        c = self.cut
        whole = c.Hkv // c.kv_heads
        shape = (c.D, c.block_k) if c.turned else (c.block_k, c.D)
        return self._spec(
            (1, c.kv_heads, *shape),
            lambda b, h, i, j: (
                b,
                _part(h, c.programs, whole),
                *((0, j) if c.turned else (j, 0)),
            ),
        )

    def key_scales(self) -> pl.BlockSpec:
        """Of `[B, Hkv, K]`: all heads, since some of them are no whole tile."""
        c = self.cut
        return self._spec((1, c.Hkv, c.block_k), lambda b, h, i, j: (b, 0, j))

    def key_sums(self) -> pl.BlockSpec:
        """Of `[B, programs · kv_heads, K, D]`."""
        c = self.cut
        return self._spec((1, c.kv_heads, c.block_k, c.D), lambda b, h, i, j: (b, h, j, 0))

    def rows_of_queries(self, count: int) -> pl.BlockSpec:
        """Of `[B, H, Nq, count, block_q]`."""
        c = self.cut
        return self._spec((1, c.heads, 1, count, c.block_q), lambda b, h, i, j: (b, h, i, 0, 0))

    def where(self, where: Where) -> Where:
        c = self.cut
        return Where(
            self._spec((1, 1, 2, c.block_q), lambda b, h, i, j: (b, i, 0, 0)),
            self._spec((1, 1, 1, c.block_k), lambda b, h, i, j: (b, j, 0, 0)),
            None if where.slopes is None else pl.BlockSpec(memory_space=pltpu.SMEM),
        )

    def inputs(self, x: Inputs) -> Inputs:
        q: Any = self.queries()
        k: Any = self.keys()
        scale: Any = None if x.k_scale is None else self.key_scales()
        return Inputs(q, k, k, None if x.q_sinks is None else q, scale, scale)

    def call(self, kernel, words: Array, *, interpret: Any, name: str, **more):
        """`pl.pallas_call` over this grid. `more`: in_specs, out_specs, out_shape, scratch_shapes,
        cost_estimate."""
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=self.shape,
            in_specs=more["in_specs"],
            out_specs=more["out_specs"],
            scratch_shapes=more["scratch_shapes"],
        )
        run = pl.pallas_call(
            kernel,
            grid_spec=spec,
            out_shape=more["out_shape"],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            cost_estimate=more["cost_estimate"],
            interpret=False if interpret is None else interpret,
            name=name,
        )
        return lambda *arrays: run(words.reshape(-1), *arrays)


def _part(h, programs: int, parts: int):
    """Of `parts` equal parts of the programs, the one that program h is in."""
    if parts == programs:
        return h
    return 0 if parts == 1 else lax.div(h, jnp.int32(programs // parts))


def kinds(rule: Rule, x: Inputs) -> tuple[int, ...]:
    """The states that a pair with something to see may have: a kernel has a step for each."""
    if not rule.sinks:
        return (NEAR,)
    return (NEAR, FAR) if x.q_sinks is None else (NEAR, FAR, NEAR | FAR)


class Step:
    """A pair of blocks inside a kernel: its mask, and the scores of any head of the program.

    A pair of sinks alone takes only the keys among which they lie.
    """

    def __init__(self, rule: Rule, c: Cut, kind: int, x: Inputs, where: Where, i, j):
        self.rule, self.cut, self.kind, self.x, self.i, self.j = rule, c, kind, x, i, j
        self.count_k = c.front if kind == FAR else c.block_k
        self.made: dict[tuple[int, int], Array] = {}
        queries, keys = where.queries[0, 0], where.keys[0, 0]
        self.at = queries[:1], column(keys)[: self.count_k], queries[1:]
        seen = visible(rule, *self.at)
        self.hidden = jnp.where(seen, 0.0, -jnp.inf)
        self.slopes = where.slopes
        self.distance = None
        if where.slopes is not None:
            self.distance = distance(rule, *self.at).astype(jnp.float32)
        if kind == NEAR | FAR:
            self.sink = is_sink(rule, self.at[1], self.at[2])

    def queries(self, ref, h: int) -> Array:
        """Of head h of the program: `[block_q, D]`, zeros beyond the end."""
        return _held(ref[0, h], self.i, self.cut.T, self.cut.block_q)

    def keys(self, ref, h: int) -> Array:
        """`[count_k, D]`, zeros beyond the end (or any integers, whose scales are zeros)."""
        c = self.cut
        at = h // c.group

        def rows() -> Array:
            return ref[0, at, : self.count_k]

        def made() -> Array:
            if c.turned:
                whole = ref[0, at].astype(jnp.float32).T
                return whole[: self.count_k].astype(self.x.q.dtype)
            return rows().astype(self.x.q.dtype)

        if ref.dtype == self.x.q.dtype:
            return _held(rows(), self.j, c.K, c.block_k)
        if self.x.k_scale is not None:
            return self._once(ref, at, made)
        return self._once(ref, at, lambda: _held(made(), self.j, c.K, c.block_k))

    def scale(self, ref, h: int) -> Array:
        """`[count_k, 1]`, zeros beyond the end."""
        c = self.cut
        at = h // c.group

        def made() -> Array:
            first = _part(pl.program_id(1), c.programs, c.Hkv // c.kv_heads) * c.kv_heads
            scale = column(ref[0, pl.ds(first + at, 1)])[: self.count_k]
            return _held(scale, self.j, c.K, c.block_k)

        return self._once(ref, at, made)

    def _once(self, ref, at: int, make: Callable[[], Array]) -> Array:
        """For all heads that share a KV head."""
        if (id(ref), at) not in self.made:
            self.made[id(ref), at] = make()
        return self.made[id(ref), at]

    def scores(self, h: int, k: Array) -> tuple[Array, Array | None]:
        """`[count_k, block_q]`, −inf where hidden; and their slope over the product before the
        soft cap (None: 1)."""
        rule, x = self.rule, self.x
        alone = self.kind == FAR and x.q_sinks is not None
        s = dot_nt(k, self.queries(x.q_sinks if alone else x.q, h))
        if self.kind == NEAR | FAR:
            front = self.cut.front
            far = dot_nt(k[:front], self.queries(x.q_sinks, h))
            first = jnp.where(self.sink[:front], far, s[:front])
            s = first if front == self.count_k else jnp.concatenate([first, s[front:]], axis=0)
        s = s * rule.scale
        if x.k_scale is not None:
            s = s * self.scale(x.k_scale, h)
        slope = None
        if rule.soft_cap is not None:
            bent = jnp.tanh(s * (1 / rule.soft_cap))
            s, slope = rule.soft_cap * bent, 1 - bent * bent
        if self.distance is not None:
            s = s - self.slopes[pl.program_id(1) * self.cut.heads + h] * self.distance
        return s + self.hidden, slope

    def gradients(self, h: int, k: Array, v: Array, rows, dout: Array) -> tuple[Array, Array]:
        """The weights, and the gradient of the products q · k.

        Args:
            rows: a reference to `[1, heads, 1, 2, block_q]`: log-sum-exp and delta.
        """
        scores, slope = self.scores(h, k)
        weights = jnp.exp(scores - rows[0, h, 0, :1])
        ds = weights * (dot_nt(v, dout) - rows[0, h, 0, 1:]) * self.rule.scale
        return weights, ds if slope is None else ds * slope

    def by_query(self, ds: Array) -> tuple[Array | None, ...]:
        """The gradient of the products with `q`, and with `q_sinks` where there is one; None where
        this pair has no such product. Of fewer keys than the block has, the first."""
        if self.x.q_sinks is None:
            return (ds,)
        if self.kind == NEAR:
            return ds, None
        if self.kind == FAR:
            return None, ds
        front = self.cut.front
        return jnp.where(self.sink, 0.0, ds), jnp.where(self.sink[:front], ds[:front], 0.0)


def column(row: Array) -> Array:
    """`[1, N]` to `[N, 1]`."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _held(rows: Array, block, length: int, size: int) -> Array:
    """Zeros for what lies beyond the end of an array: there is anything there, NaN even."""
    if length % size == 0:
        return rows
    row = lax.broadcasted_iota(jnp.int32, (rows.shape[0], 1), 0)
    kept = jnp.where(row < length - block * size, rows.astype(jnp.float32), 0.0)
    return kept.astype(rows.dtype)


def dot_nt(a: Array, b: Array) -> Array:
    """a · bᵀ, in float32; of float32 in full precision, where the unit takes bfloat16."""
    return _dot(a, b, 1, 1)


def dot_nn(a: Array, b: Array) -> Array:
    return _dot(a, b, 1, 0)


def dot_tn(a: Array, b: Array) -> Array:
    return _dot(a, b, 0, 0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b.astype(a.dtype),
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def cost(
    grid: Grid, bound: Bound, x: Inputs, products: int, again: int, once: Any, each: Any
) -> pl.CostEstimate:
    """Of the pairs listed at most.

    Args:
        products: matrix products of a pair; `again`: more of them in a pair of sinks and others.
        once: arrays read or written once. each: arrays of which each pair reads a block.
    """
    c = grid.cut
    scores = c.block_q * (bound.near * c.block_k + bound.far * c.front)
    both = c.block_q * c.count_q * c.front if x.q_sinks is not None else 0
    blocks, heads = (c.count_k, c.Hkv) if grid.inner_keys else (c.count_q, c.H)
    taken = c.kv_heads if grid.inner_keys else c.heads
    reads = (bound.near + bound.far) * c.programs * taken / (blocks * heads)
    return pl.CostEstimate(
        flops=2 * c.B * c.H * c.D * (products * scores + again * both),
        transcendentals=c.B * c.H * scores,
        bytes_accessed=_bytes(once) + int(reads * _bytes(each)),
    )


def _bytes(arrays: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))
