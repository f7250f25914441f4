"""The protocol that every cache follows, the clock that all share, and a model's stack of caches.

A *policy* (`SinkRing`, `FullCache`) is a small frozen description. Its `init` makes a *cache*: a
frozen pytree of fixed shape for one layer, whose one verb is `attend`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Num, UInt32

from pallas_kernels.flash.vjp import merged
from pallas_kernels.ring import Ring, empty_ring, floats, stored
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sink_attention import sink_attention

KV_DTYPES = (None, "float32", "bfloat16", "int8", "int4")
# A cache in 4 bits rounds a token when it is so many tokens old. Most of the attention goes to what
# is newer: SmolLM2-135M's perplexity rises by at most 0.3%; were all rounded at once, by 4 to 5%
# (docs/benchmarks.md).
RECENT = 32


class Positions(Protocol):
    """What a position does to a query or key: `sinkjax.models.positions.Rotary`, or your own."""

    def rotate(
        self, x: Float[Array, "B T H D"], positions: UInt32[Array, "B T"]
    ) -> Float[Array, "B T H D"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """How far each row of a cache has come.

    Attributes:
        ticks: `[B]`, tokens written. A ring folds it (see `ring.py`), so that it stays small.
        position: `[B]`, the position of the next token modulo 2³²; wraps without harm.
    """

    ticks: Int32[Array, " B"]
    position: UInt32[Array, " B"]

    @classmethod
    def zero(cls, batch: int) -> Self:
        return cls(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.uint32))


class Scores(NamedTuple):
    """How a model's attention scores differ from q · k / √D. See `sink_attention` for each.

    Attributes:
        scale: None: 1/√D.
        soft_cap: None: none.
        sink_logits: `[H]`, float32: a learned logit per head in each softmax.
        alibi_slopes: `[H]`, float32: linear biases.
    """

    scale: float | None = None
    soft_cap: float | None = None
    sink_logits: Float[Array, " H"] | None = None
    alibi_slopes: Float[Array, " H"] | None = None


PLAIN = Scores()


class Cache(Protocol):
    """What one layer remembers: a frozen dataclass with one verb.

    It has a field `clock`, and what that holds follows from its policy: layers of the same policy
    share one. Its field `recent` holds the arrays that move at each token, or None. A cache that is
    made of others has neither, and names the fields that hold them in `parts`.
    """

    @property
    def policy(self) -> "LayerPolicy": ...

    def attend(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        positions: Positions | None,
        lengths: Int32[Array, " B"] | None = None,
        *,
        scores: Scores = PLAIN,
        backend: str | None = None,
    ) -> tuple[Float[Array, "B T H D"], Self]:
        """Takes T new tokens a row in, and lets each attend to what the policy grants it.

        Args:
            q, k, v: projections of the new tokens, not yet rotated.
            positions: the position scheme; None: the model has none.
            lengths: how many of the T tokens of each row are real (a prefix); the others are
                padding, which no token sees and no cache keeps. None: all are.
            scores: the model's own way with attention scores.
            backend: of the attention ops (`pallas_kernels`); None: the best that serves.

        Returns:
            The attention output (at padding: anything finite) and the cache with the tokens in.
        """
        ...


class LayerPolicy(Protocol):
    """What one layer remembers: hashable, without arrays."""

    @property
    def kv_dtype(self) -> str | None:
        """Of the keys and values kept; None: the model's own."""
        ...

    @property
    def capacity(self) -> int:
        """The most tokens a row can hold."""
        ...

    @property
    def reach(self) -> int:
        """The greatest distance + 1 between a query and a key that is no sink."""
        ...

    def init(
        self, *, batch: int, kv_heads: int, head_dim: int, dtype: DTypeLike = ...
    ) -> Cache: ...

    @property
    def limit(self) -> int | None:
        """The most tokens that a row can ever take in; None: any number."""
        ...

    def check(self, tokens: int) -> None:
        """Raises `CacheFull` where a row of so many tokens, counted on the host, does not fit."""
        ...


class ModelPolicy(Protocol):
    """What a model remembers, where its layers or heads differ."""

    @property
    def capacity(self) -> int: ...

    @property
    def limit(self) -> int | None: ...

    def check(self, tokens: int) -> None: ...

    def by_layer(self, layers: int, kv_heads: int) -> tuple[LayerPolicy, ...]:
        """The policy of each layer. Raises ValueError: it is for a model of other sizes."""
        ...


Policy = LayerPolicy | ModelPolicy


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A policy for each layer.

    Attributes:
        policies: one a layer of the model, from the first.

    Raises:
        ValueError: none are given.
    """

    policies: tuple[LayerPolicy, ...]

    def __post_init__(self):
        object.__setattr__(self, "policies", tuple(self.policies))
        if not self.policies:
            raise ValueError("PerLayer needs a policy for each layer, got none")

    @property
    def capacity(self) -> int:
        return max(policy.capacity for policy in self.policies)

    @property
    def limit(self) -> int | None:
        return min((p.limit for p in self.policies if p.limit is not None), default=None)

    def check(self, tokens: int) -> None:
        """Raises `CacheFull` where a row of so many tokens does not fit in one of the layers."""
        for policy in self.policies:
            policy.check(tokens)

    def by_layer(self, layers: int, kv_heads: int) -> tuple[LayerPolicy, ...]:
        if len(self.policies) != layers:
            raise ValueError(
                f"PerLayer has {len(self.policies)} policies, the model {layers} layers: "
                "give one for each"
            )
        return self.policies


def by_layer(policy: Policy, layers: int, kv_heads: int) -> tuple[LayerPolicy, ...]:
    """The policy of each of so many layers. Raises ValueError: it is for other sizes."""
    if hasattr(policy, "by_layer"):
        return policy.by_layer(layers, kv_heads)
    return (cast(LayerPolicy, policy),) * layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """The caches of all layers of a model. They march in step, so that layers of the same policy
    share one clock.

    Iterates over the layers' caches, and is made again from those that `attend` returned.
    A tuple of separate arrays, not one stacked array: each is updated in place.
    """

    layers: tuple[Cache, ...]  # their own clocks are None
    clocks: tuple[Clock, ...]  # one a policy, in the order in which the layers have them

    @classmethod
    def of(cls, caches: Iterable[Cache]) -> Self:
        clocks: dict[LayerPolicy, Clock] = {}

        def without(cache: Any) -> Any:
            clocks.setdefault(cache.policy, cache.clock)
            return dataclasses.replace(cache, clock=None)

        layers = tuple(_each(without, cache) for cache in caches)
        return cls(layers, tuple(clocks.values()))

    @classmethod
    def init(
        cls,
        policy: Policy,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Empty caches.

        Raises:
            ValueError: the policy is for a model of other sizes.
        """
        return cls.of(
            own.init(batch=batch, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
            for own in by_layer(policy, layers, kv_heads)
        )

    def __iter__(self) -> Iterator[Cache]:
        unread, clocks = iter(self.clocks), {}

        def put(cache: Any) -> Any:
            if cache.policy not in clocks:  # met in the order in which `of` met them
                clocks[cache.policy] = next(unread)
            return dataclasses.replace(cache, clock=clocks[cache.policy])

        return (_each(put, cache) for cache in self.layers)

    def but_still(self, still: Bool[Array, " B"], before: Self) -> Self:
        """These caches, after the token that each row took in since `before`; rows that stand still
        go on as if they had not. (What they wrote lies in the slot of their next token, which no
        query sees before that token overwrites it.)"""

        chosen = functools.partial(unless, still)

        def restored(new: Any, old: Any) -> Any:
            return dataclasses.replace(new, recent=jax.tree.map(chosen, new.recent, old.recent))

        layers = (_each(restored, *both) for both in zip(self.layers, before.layers, strict=True))
        clocks = jax.tree.map(chosen, self.clocks, before.clocks)
        return dataclasses.replace(self, layers=tuple(layers), clocks=clocks)

    @property
    def position(self) -> UInt32[Array, " B"]:
        """The position of each row's next token, modulo 2³²."""
        return self.clocks[0].position


def unless(still: Bool[Array, " B"], new: Num[Array, "B ..."], old: Num[Array, "B ..."]) -> Array:
    """`new`, but the rows of `old` where they stand still."""
    return jnp.where(still.reshape(-1, *[1] * (new.ndim - 1)), old, new)


def _each(f: Callable[..., Any], cache: Any, *others: Any) -> Any:
    """A cache with f of it, or of each cache that it is made of (its fields named in `parts`); and
    of the same in other caches of its kind."""
    if not hasattr(cache, "parts"):
        return f(cache, *others)
    new = {
        name: _each(f, *(getattr(each, name) for each in (cache, *others))) for name in cache.parts
    }
    return dataclasses.replace(cache, **new)


def rotated(positions: Positions | None, x: Array, at: Array) -> Array:
    return x if positions is None else positions.rotate(x, at)


def within(positions: Positions | None, span: int) -> Positions | None:
    """Positions that depend on the length of the text (`Rotary.within`), fixed to that of a
    cache; others as they are."""
    fix = getattr(positions, "within", None)
    return positions if fix is None else fix(span)


def empty(
    policy: LayerPolicy,
    sinks: int,
    window: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> tuple[Ring, Ring | None]:
    """The arrays of an empty cache: a ring, and the tokens that are not yet in it (see
    `through_ring`), where its policy keeps some.

    Raises:
        ValueError: a size < 1, or one that does not suit the policy's `kv_dtype`.
    """
    for name, value in dict(batch=batch, kv_heads=kv_heads, head_dim=head_dim).items():
        if value < 1:
            raise ValueError(f"a cache needs {name} ≥ 1, got {value}")
    late = recent_tokens(policy.kv_dtype, window)
    kept = policy.kv_dtype or dtype
    ring = empty_ring(batch, kv_heads, sinks + window - late, head_dim, kept)
    return ring, empty_ring(batch, kv_heads, late, head_dim, dtype) if late else None


def recent_tokens(kv_dtype: str | None, window: int) -> int:
    """How many of the newest tokens a cache keeps unrounded: `RECENT` in 4 bits, in a short window
    half of it; otherwise none."""
    return min(RECENT, window // 2) if kv_dtype == "int4" else 0


def check_kv_dtype(kv_dtype: str | None) -> None:
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be one of {KV_DTYPES}, got {kv_dtype!r}")


def through_ring(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    ring: Ring,
    recent: Ring | None,
    ticks: Int32[Array, " B"],
    *,
    sinks: int,
    window: int,
    q_sinks: Float[Array, "B T H D"] | None = None,
    lengths: Int32[Array, " B"] | None,
    write: Callable[[Array, Array, Array], Array],
    scores: Scores,
    backend: str | None,
) -> tuple[Float[Array, "B T H D"], Ring, Ring | None]:
    """Attention to [ring | recent | new tokens], and both with the new tokens in them.

    The R recent tokens, in floats, are those that came last; a token enters the ring R tokens late.
    So the ring is that of a stream R tokens behind, and reaches back W − R from there: a query sees
    the token that leaves and all before it as the ring keeps them, and the newest R, its own among
    them, as they are. That holds in chunks of any length.

    A quantised ring holds keys and values whose channels are mixed (see `mixed`), which changes
    nothing but what rounding costs.

    Args:
        q, k, v, q_sinks: rotated. While a sink is recent, `q` must serve it as well.
        recent: R tokens in their order; None: a token enters the ring at once.
        write: puts new tokens `[B, Hkv, T, ...]` into a buffer `[B, Hkv, C, ...]`, the first of
            them of this tick `[B]`; those of negative ticks are none.
    """
    mix = mixed if ring.k_scale is not None else lambda x: x
    q, k, v = mix(q), mix(k), mix(v)
    q_sinks = None if q_sinks is None else mix(q_sinks)
    T = q.shape[1]
    common: Any = dict(sinks=sinks, q_sinks=q_sinks, lengths=lengths, write=write, backend=backend)
    if recent is None:
        out, _, ring = _attended(q, k, v, ring, ticks, window=window, scores=scores, **common)
        return mix(out), ring, None

    R = recent.k.shape[2]
    keys, values = (
        jnp.concatenate([old.swapaxes(1, 2).astype(q.dtype), new], axis=1)
        for old, new in ((recent.k, k), (recent.v, v))
    )  # [B, R + T, Hkv, D]
    out, lse, ring = _attended(
        q,
        keys[:, :T],
        values[:, :T],
        ring,
        ticks - R,
        window=window - R,
        scores=scores._replace(sink_logits=None),
        **common,
    )
    if scores.alibi_slopes is not None:
        lse -= R * scores.alibi_slopes  # each is R tokens farther than it seemed
    near, near_lse = sink_attention(
        q,
        keys[:, 1:],
        values[:, 1:],
        window=R,
        ticks=ticks - R + 1,
        return_lse=True,
        backend="reference" if T == 1 else backend,  # R keys: less than a kernel is worth
        **scores._asdict(),
    )
    out, _ = merged([(near, near_lse), (out, lse)])
    if lengths is None:
        k, v = keys[:, T:], values[:, T:]
    else:
        newest = jax.vmap(lambda x, by: jax.lax.dynamic_slice_in_dim(x, by, R))
        k, v = newest(keys, lengths), newest(values, lengths)
    recent = Ring(*(x.swapaxes(1, 2).astype(recent.k.dtype) for x in (k, v)))
    return mix(out.astype(q.dtype)), ring, recent


def _attended(
    q: Array,
    k: Array,
    v: Array,
    ring: Ring,
    ticks: Array,
    *,
    sinks: int,
    window: int,
    q_sinks: Array | None,
    lengths: Array | None,
    write: Callable[[Array, Array, Array], Array],
    scores: Scores,
    backend: str | None,
) -> tuple[Array, Array, Ring]:
    """The output, its log-sum-exp, and the ring with the new tokens in it. Where `ticks` is
    negative, so many of the new tokens are none, and their queries see nothing."""
    options: Any = dict(sinks=sinks, window=window, q_sinks=q_sinks, backend=backend)
    options |= scores._asdict() | dict(return_lse=True)
    if q.shape[1] == 1 and lengths is None:
        # What is no token lands in the first slot, where the first that is one overwrites it.
        out, ring, lse = ring_decode(q, k, v, ring, jnp.maximum(ticks, 0), **options)
        return out, jnp.where(ticks[:, None, None] < 0, -jnp.inf, lse), ring
    new = stored(k.swapaxes(1, 2), v.swapaxes(1, 2), ring.k.dtype)
    seen = (x.swapaxes(1, 2) for x in floats(new, k.dtype)[:2])
    out, lse = sink_attention(q, *seen, ring=ring, ticks=ticks, **options)
    # Later tokens of a chunk take slots that earlier ones still see, so it is written last.
    # Without this, XLA sees no order between reading the ring and writing it, and copies it.
    out, ring = jax.lax.optimization_barrier((out, ring))
    return out, lse, jax.tree.map(lambda buffer, x: write(buffer, x, ticks), ring, new)


def mixed(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The channels of each head, mixed by an orthonormal Hadamard matrix, which is its own inverse
    (QuaRot, arXiv 2404.00456): no channel is then far larger than the others, which one scale for
    all would serve badly. Scores are the same where queries and keys both are mixed."""
    D = x.shape[-1]
    n = D & -D  # the largest power of two that divides it: blocks of that size are mixed
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.reshape(*x.shape[:-1], D // n, n)
    # Of plus and minus one, which bfloat16 holds exactly.
    y = jnp.matmul(
        blocks,
        matrix.astype(x.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return (y * n**-0.5).reshape(x.shape).astype(x.dtype)


def write_span(
    buffer: Num[Array, "B Hkv C ..."],
    new: Num[Array, "B Hkv T ..."],
    at: Int32[Array, " B"],
    first: Int32[Array, " B"] | int,
    last: Int32[Array, " B"],
) -> Num[Array, "B Hkv C ..."]:
    """Gives slot `at[b] + j` of row b the chunk's token j, for `first[b]` ≤ j < `last[b]`, and
    touches no other: such slots lie within the buffer."""
    B, Hkv, C, *rest = buffer.shape
    T = min(new.shape[2], C)
    first = jnp.broadcast_to(first, at.shape)

    def with_row(row, buffer):
        # T slots that hold them all, even where they are the last or the first of the buffer.
        start = jnp.clip(at[row], 0, C - T)
        place = (row, 0, start, *(0 for _ in rest))
        old = jax.lax.dynamic_slice(buffer, place, (1, Hkv, T, *rest))
        source = start + jnp.arange(T) - at[row]
        lands = (source >= first[row]) & (source < last[row])
        # No gather: for the layout that it likes a TPU would copy the whole cache.
        chunk = jax.lax.dynamic_index_in_dim(new, row)
        moved = jnp.roll(chunk, at[row] - start, axis=2)[:, :, :T]
        span = jnp.where(lands.reshape(T, *(1 for _ in rest)), moved, old)
        return jax.lax.dynamic_update_slice(buffer, span, place)

    return jax.lax.fori_loop(0, B, with_row, buffer, unroll=min(B, 8))


def write_chunk(
    buffer: Num[Array, "B Hkv C ..."],
    new: Num[Array, "B Hkv T ..."],
    source: Int32[Array, "B C"],
    lands: Bool[Array, "B C"],
) -> Num[Array, "B Hkv C ..."]:
    """Gives each slot c of row b the chunk's token `source[b, c]` where `lands[b, c]` is true."""
    last = (1,) * (buffer.ndim - 3)
    index = jnp.clip(source, 0, new.shape[2] - 1)[:, None].reshape(source.shape[0], 1, -1, *last)
    moved = jnp.take_along_axis(new, index, axis=2)
    return jnp.where(lands.reshape(index.shape), moved, buffer)
