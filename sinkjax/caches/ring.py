"""Attention sinks and a window of recent tokens, in a ring (StreamingLLM, arXiv 2309.17453)."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.sink_attention import Segment, sink_attention
from sinkjax.caches.protocol import Clock, Positions, check_init, rotated, write_chunk, write_one


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
        if T == 1 and lengths is None:
            return self._attend_one(q, q_sinks, k, v)
        return self._attend_chunk(q, q_sinks, k, v, lengths)

    def _attend_one(self, q, q_sinks, k, v) -> tuple[Array, Self]:
        """The token that leaves is out of the window of the one that takes its slot: write first,
        and the ring alone is what the query sees."""
        B = q.shape[0]
        ticks, S, C = self.clock.ticks, self.policy.sinks, self.policy.capacity
        slot = jnp.where(ticks < S, ticks, S + (ticks - S) % self.policy.window)
        keys, values = write_one(self.k, k, slot), write_one(self.v, v, slot)
        mask = jnp.arange(C) <= ticks[:, None, None]
        ring = Segment(keys, values, mask, jnp.ones((B, S), bool))
        out = sink_attention(q, [ring], q_sinks=q_sinks)
        return out, dataclasses.replace(self, k=keys, v=values, clock=self._advanced(1))

    def _attend_chunk(self, q, q_sinks, k, v, lengths) -> tuple[Array, Self]:
        """Later tokens of the chunk may take slots that earlier ones still see: attend to
        [ring | chunk], then write."""
        S, W = self.policy.sinks, self.policy.window
        B, T = q.shape[:2]
        ticks = self.clock.ticks[:, None]
        lengths = jnp.full(B, T, jnp.int32) if lengths is None else lengths
        row = jnp.arange(T)

        # A slot of the ring, by how many tokens ago it was written (0: the newest).
        age = (ticks - 1 - S - jnp.arange(W)) % W
        in_window = (age < ticks - S)[:, None] & (row[:, None] + 1 + age[:, None] < W)
        is_sink = jnp.broadcast_to((jnp.arange(S) < ticks)[:, None], (B, T, S))
        old = Segment(
            self.k,
            self.v,
            jnp.concatenate([is_sink, in_window], axis=-1),
            jnp.ones((B, S), bool),
        )
        distance = row[:, None] - row
        chunk_sinks = ticks + row < S
        mask = (distance >= 0) & ((distance < W) | chunk_sinks[:, None])
        mask &= (row < lengths[:, None])[:, None]
        chunk = Segment(k.swapaxes(1, 2), v.swapaxes(1, 2), mask, chunk_sinks[:, :S])
        # A prompt's first chunk meets an empty ring: leaving that out saves a third of its time.
        out = jax.lax.cond(
            jnp.any(ticks > 0),
            lambda: sink_attention(q, [old, chunk], q_sinks=q_sinks),
            lambda: sink_attention(q, [chunk], q_sinks=q_sinks),
        )
        # Without this, XLA sees no order between reading the ring and writing it, and copies it.
        out, old_k, old_v = jax.lax.optimization_barrier((out, self.k, self.v))

        # For each slot, the newest token of the chunk that belongs there.
        last = ticks + lengths[:, None] - 1
        newest = last - (last - S - jnp.arange(W)) % W
        token = jnp.concatenate([jnp.broadcast_to(jnp.arange(S), (B, S)), newest], axis=-1)
        in_place = (jnp.arange(S + W) < S) | (token >= S)
        lands = (token >= ticks) & (token <= last) & in_place
        source = token - ticks
        keys, values = (
            write_chunk(old_k, k, source, lands),
            write_chunk(old_v, v, source, lands),
        )
        return out, dataclasses.replace(self, k=keys, v=values, clock=self._advanced(lengths))

    def _advanced(self, by: int | Array) -> Clock:
        S, W = self.policy.sinks, self.policy.window
        ticks = self.clock.ticks + by
        folded = jnp.where(ticks < S + W, ticks, S + W + (ticks - S) % W)
        by = jnp.asarray(by, jnp.uint32)
        return Clock(folded, self.clock.position + by)
