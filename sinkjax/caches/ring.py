"""Attention sinks and a window of recent tokens, in a ring (StreamingLLM, arXiv 2309.17453)."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.ring import Ring
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sink_attention import sink_attention
from sinkjax.caches.protocol import Clock, Positions, check_init, rotated, write_chunk


@dataclasses.dataclass(frozen=True)
class SinkRing:
    """Keeps the first `sinks` tokens and the newest `window`, the current one among them.

    Attributes:
        sinks: S ≥ 0. 0 is plain window attention.
        window: W ≥ 1.
        positions: `"cache"`: a sink seems to lie right before the window, however long ago it
            was (StreamingLLM); `"absolute"`: it stays where it was (DuoAttention, LServe).

    Raises:
        ValueError: sinks < 0, window < 1, or an unknown kind of positions.
    """

    sinks: int
    window: int
    positions: Literal["cache", "absolute"] = "cache"

    def __post_init__(self):
        if self.sinks < 0:
            raise ValueError(f"sinks must be ≥ 0, got {self.sinks}")
        if self.window < 1:
            raise ValueError(f"window must be ≥ 1, got {self.window}")
        if self.positions not in ("cache", "absolute"):
            raise ValueError(f'positions must be "cache" or "absolute", got {self.positions!r}')

    @property
    def capacity(self) -> int:
        return self.sinks + self.window

    @property
    def reach(self) -> int:
        return self.window

    @property
    def limit(self) -> None:
        return None

    def check(self, tokens: int) -> None:
        """A ring takes any number of tokens."""

    def init(
        self, *, batch: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
    ) -> "RingCache":
        """An empty ring of `[batch, kv_heads, sinks + window, head_dim]` keys and values."""
        check_init(batch, kv_heads, head_dim)
        shape = (batch, kv_heads, self.capacity, head_dim)
        return RingCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), Clock.zero(batch), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """One layer's ring. Token t lies in slot t while t < S, else in slot S + (t − S) mod W.

    A key is stored rotated once: a sink at its own place in the cache, any other at its own
    absolute position. Rotary scores depend on the difference of two positions alone, so instead
    of re-rotating every key at every step, the query is rotated twice: for the window at its
    absolute position, for the sinks at min(t, S + W − 1), its place in the cache.

    `clock.ticks` is folded: t itself until the ring is full, then S + W + (t − S) mod W. That
    keeps it below S + 2W for ever, and says all: slots filled and the slot that comes next.
    """

    k: Float[Array, "B Hkv C D"]
    v: Float[Array, "B Hkv C D"]
    clock: Clock
    policy: SinkRing = dataclasses.field(metadata=dict(static=True))

    def attend(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        positions: Positions | None,
        lengths: Int32[Array, " B"] | None = None,
        backend: str | None = None,
    ) -> tuple[Float[Array, "B T H D"], Self]:
        """See `Cache.attend`. A query at t sees key i where i ≤ t and (i < S or t − i < W)."""
        S, W = self.policy.sinks, self.policy.window
        T = q.shape[1]
        tick = self.clock.ticks[:, None] + jnp.arange(T)
        at = self.clock.position[:, None] + jnp.arange(T, dtype=jnp.uint32)
        q_sinks = None
        key_at = at
        if self.policy.positions == "cache" and S and positions is not None:
            place = jnp.minimum(tick, S + W - 1).astype(jnp.uint32)
            key_at = jnp.where(tick < S, place, at)
            q_sinks = rotated(positions, q, place)
        q = rotated(positions, q, at)
        k = rotated(positions, k, key_at)
        ring = Ring(self.k, self.v)
        if T == 1 and lengths is None:
            out, ring = ring_decode(
                q,
                k,
                v,
                ring,
                self.clock.ticks,
                sinks=S,
                window=W,
                q_sinks=q_sinks,
                backend=backend,
            )
            return out, self._with(ring, 1)
        out = sink_attention(
            q,
            k,
            v,
            sinks=S,
            window=W,
            q_sinks=q_sinks,
            ring=ring,
            ticks=self.clock.ticks,
            backend=backend,
        )
        # Later tokens of a chunk take slots that earlier ones still see, so it is written last.
        # Without this, XLA sees no order between reading the ring and writing it, and copies it.
        out, ring = jax.lax.optimization_barrier((out, ring))
        lengths = jnp.full(q.shape[0], T, jnp.int32) if lengths is None else lengths
        return out, self._with(self._written(ring, k, v, lengths), lengths)

    def _written(self, ring: Ring, k: Array, v: Array, lengths: Array) -> Ring:
        """The ring with the first `lengths` tokens of a chunk in it."""
        S, W = self.policy.sinks, self.policy.window
        ticks = self.clock.ticks[:, None]
        # For each slot, the newest token of the chunk that belongs there.
        last = ticks + lengths[:, None] - 1
        newest = last - (last - S - jnp.arange(W)) % W
        first = jnp.broadcast_to(jnp.arange(S), (newest.shape[0], S))
        token = jnp.concatenate([first, newest], axis=-1)
        in_place = (jnp.arange(S + W) < S) | (token >= S)
        lands = (token >= ticks) & (token <= last) & in_place
        source = token - ticks
        return Ring(write_chunk(ring.k, k, source, lands), write_chunk(ring.v, v, source, lands))

    def _with(self, ring: Ring, by: int | Array) -> Self:
        """This cache with another ring, `by` tokens on."""
        S, W = self.policy.sinks, self.policy.window
        ticks = self.clock.ticks + by
        folded = jnp.where(ticks < S + W, ticks, S + W + (ticks - S) % W)
        by = jnp.asarray(by, jnp.uint32)
        clock = Clock(folded, self.clock.position + by)
        return dataclasses.replace(self, k=ring.k, v=ring.v, clock=clock)
