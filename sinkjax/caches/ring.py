"""Attention sinks and a window of recent tokens, in a ring (StreamingLLM, arXiv 2309.17453)."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.ring import Ring
from sinkjax.caches.protocol import (
    PLAIN,
    Clock,
    Positions,
    Scores,
    check_kv_dtype,
    empty,
    recent_tokens,
    rotated,
    through_ring,
    within,
    write_chunk,
    write_span,
)


@dataclasses.dataclass(frozen=True)
class SinkRing:
    """Keeps the first `sinks` tokens and the newest `window`, the current one among them.

    Attributes:
        sinks: S ≥ 0. 0 is plain window attention.
        window: W ≥ 1.
        positions: `"cache"`: a sink seems to lie right before the window, however long ago it
            was (StreamingLLM); `"absolute"`: it stays where it was (DuoAttention, LServe).
        kv_dtype: of the keys and values kept: `"float32"`, `"bfloat16"`, or quantised with a scale
            per token and head, `"int8"` or `"int4"`; None: the model's own. In 4 bits all but the
            newest 32 tokens, or half a window shorter than 64.

    Raises:
        ValueError: sinks < 0, window < 1, or an unknown kind of positions or kv_dtype.
    """

    sinks: int
    window: int
    positions: Literal["cache", "absolute"] = "cache"
    kv_dtype: str | None = None

    def __post_init__(self):
        if self.sinks < 0:
            raise ValueError(f"sinks must be ≥ 0, got {self.sinks}")
        if self.window < 1:
            raise ValueError(f"window must be ≥ 1, got {self.window}")
        if self.positions not in ("cache", "absolute"):
            raise ValueError(f'positions must be "cache" or "absolute", got {self.positions!r}')
        check_kv_dtype(self.kv_dtype)

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
        ring, recent = empty(self, self.sinks, self.window, batch, kv_heads, head_dim, dtype)
        return RingCache(ring, recent, Clock.zero(batch), self)

    def folded(self, ticks: Int32[Array, " B"] | int) -> Int32[Array, " B"]:
        """The ticks of a `RingCache` that took so many tokens in: t itself until it is full, then
        below S + 2W for ever, and the same in all that follows from them: the slots that are
        filled, and the one that comes next."""
        turn = self.window - recent_tokens(self.kv_dtype, self.window)
        past = ticks - self.capacity
        return jnp.where(past < 0, ticks, self.capacity + past % turn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """One layer's ring. Token t lies in slot t while t < S, else in slot S + (t − S) mod W. (In 4
    bits, with the R newest tokens in `recent`: mod W − R. See `through_ring`.)

    A key is stored rotated once: a sink at its own place in the cache, any other at its own
    absolute position. Rotary scores depend on the difference of two positions alone, so instead
    of re-rotating every key at every step, the query is rotated twice: for the window at its
    absolute position, for the sinks at min(t, S + W − 1), its place in the cache.

    `clock.ticks` is folded, see `SinkRing.folded`.
    """

    ring: Ring
    recent: Ring | None
    clock: Clock
    policy: SinkRing = dataclasses.field(metadata=dict(static=True))

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
        """See `Cache.attend`. A query at t sees key i where i ≤ t and (i < S or t − i < W).

        Raises:
            ValueError: ALiBi, whose sinks lie right before the window, with absolute positions.
        """
        S, W = self.policy.sinks, self.policy.window
        if scores.alibi_slopes is not None and S and self.policy.positions == "absolute":
            raise ValueError(
                'a model with ALiBi needs SinkRing(positions="cache"): at its absolute position a '
                "sink soon has so large a bias that nothing attends to it"
            )
        bounded = self.policy.positions == "cache" or not S
        positions = within(positions, S + W if bounded else 1 << 32)
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
        by = jnp.full(q.shape[0], T, jnp.int32) if lengths is None else lengths
        out, ring, recent = through_ring(
            q,
            k,
            v,
            self.ring,
            self.recent,
            self.clock.ticks,
            sinks=S,
            window=W,
            q_sinks=q_sinks,
            lengths=lengths,
            write=lambda buffer, new, ticks: self._written(buffer, new, ticks, by),
            scores=scores,
            backend=backend,
        )
        ticks = self.policy.folded(self.clock.ticks + by)
        clock = Clock(ticks, self.clock.position + by.astype(jnp.uint32))
        return out, dataclasses.replace(self, ring=ring, recent=recent, clock=clock)

    def _written(self, buffer: Array, new: Array, ticks: Array, lengths: Array) -> Array:
        """A buffer of the ring with the first `lengths` tokens of a chunk in it."""
        S = self.policy.sinks
        W = buffer.shape[2] - S
        if new.shape[2] < W:
            at = jnp.where(ticks < S + W, ticks, ticks - W)
            end = jnp.minimum(lengths, S + W - at)
            buffer = write_span(buffer, new, at, jnp.maximum(-at, 0), end)
            return write_span(buffer, new, at - W, end, lengths)
        ticks = ticks[:, None]
        # For each slot, the newest token of the chunk that belongs there.
        last = ticks + lengths[:, None] - 1
        newest = last - (last - S - jnp.arange(W)) % W
        first = jnp.broadcast_to(jnp.arange(S), (newest.shape[0], S))
        token = jnp.concatenate([first, newest], axis=-1)
        in_place = (jnp.arange(S + W) < S) | (token >= S)
        lands = (token >= ticks) & (token <= last) & in_place
        source = token - ticks
        return write_chunk(buffer, new, source, lands)
