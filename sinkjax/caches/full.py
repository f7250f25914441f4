"""Everything is kept, up to a capacity: dense attention."""

import dataclasses
from typing import Self

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
    rotated,
    through_ring,
    within,
    write_span,
)


class CacheFull(ValueError):
    """More tokens than a `FullCache` has slots."""


@dataclasses.dataclass(frozen=True)
class FullCache:
    """Keeps all of `capacity` tokens, and takes no more.

    Attributes:
        capacity: C ≥ 1.
        kv_dtype: see `SinkRing`.

    Raises:
        ValueError: capacity < 1, or an unknown kv_dtype.
    """

    capacity: int
    kv_dtype: str | None = None

    def __post_init__(self):
        if self.capacity < 1:
            raise ValueError(f"capacity must be ≥ 1, got {self.capacity}")
        check_kv_dtype(self.kv_dtype)

    @property
    def reach(self) -> int:
        return self.capacity

    @property
    def limit(self) -> int:
        return self.capacity

    def check(self, tokens: int) -> None:
        """Raises `CacheFull` where a row would hold more than `capacity` tokens."""
        if tokens > self.capacity:
            raise CacheFull(
                f"the FullCache of {self.capacity} tokens is full: a row would hold {tokens}. "
                "Give it a larger capacity, or stream without end with SinkRing(sinks, window)."
            )

    def init(
        self, *, batch: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
    ) -> "DenseCache":
        """An empty cache of `[batch, kv_heads, capacity, head_dim]` keys and values."""
        ring, recent = empty(self, 0, self.capacity, batch, kv_heads, head_dim, dtype)
        return DenseCache(ring, recent, Clock.zero(batch), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """One layer's keys and values: token t in slot t, rotated at its absolute position; the newest
    in `recent` (see `through_ring`)."""

    ring: Ring
    recent: Ring | None
    clock: Clock
    policy: FullCache = dataclasses.field(metadata=dict(static=True))

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
        """See `Cache.attend`. Every token sees itself and all before it.

        Raises:
            CacheFull: called outside `jit`, the tokens do not fit. Inside `jit` nothing can be
                raised: there the output of a row that does not fit is NaN, and whoever counts
                tokens on the host calls `policy.check` first.
        """
        B, T = q.shape[:2]
        ticks = self.clock.ticks
        positions = within(positions, self.policy.capacity)
        at = self.clock.position[:, None] + jnp.arange(T, dtype=jnp.uint32)
        q, k = rotated(positions, q, at), rotated(positions, k, at)
        by = jnp.full(B, T, jnp.int32) if lengths is None else lengths
        overfull = ticks + by > self.policy.capacity
        if not isinstance(overfull, jax.core.Tracer):
            self.policy.check(int(jnp.max(ticks + by)))
        out, ring, recent = through_ring(  # a ring that never wraps
            q,
            k,
            v,
            self.ring,
            self.recent,
            ticks,
            sinks=0,
            window=self.policy.capacity,
            lengths=lengths,
            write=lambda buffer, new, at: write_span(buffer, new, at, jnp.maximum(-at, 0), by),
            scores=scores,
            backend=backend,
        )
        out = jnp.where(overfull[:, None, None, None], jnp.nan, out)
        clock = Clock(ticks + by, self.clock.position + by.astype(jnp.uint32))
        return out, dataclasses.replace(self, ring=ring, recent=recent, clock=clock)
