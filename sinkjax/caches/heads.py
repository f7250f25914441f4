"""Some KV heads remember everything, the others stream (DuoAttention, arXiv 2410.10819)."""

import dataclasses
import os
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from sinkjax.caches.pattern import read_gates
from sinkjax.caches.protocol import PLAIN, Cache, LayerPolicy, Positions, Scores


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Gives the retrieval heads of each layer one policy, the other heads another.

    Attributes:
        retrieval: of the heads that remember everything, such as `FullCache(131_072)`.
        streaming: of the others, such as `SinkRing(64, 256, positions="absolute")`.
        pattern: booleans `[layers, kv_heads]`, true: a retrieval head; or the path of a table
            of zeros and ones (see `read_gates`). Kept as tuples.

    Raises:
        OSError: the file can't be read.
        ValueError: the pattern is no table of booleans.
    """

    retrieval: LayerPolicy
    streaming: LayerPolicy
    pattern: Any

    def __post_init__(self):
        table = self.pattern
        if isinstance(table, str | os.PathLike):
            table = read_gates(table)
            if not np.isin(table, (0, 1)).all():
                raise ValueError(
                    f"{self.pattern} holds gates between 0 and 1: say how many heads stream, with "
                    "retrieval_heads(read_gates(path), sparsity)"
                )
            table = table == 1
        table = np.asarray(table)
        if table.ndim != 2 or not table.size or table.dtype != bool:
            raise ValueError(
                "a pattern is a table of booleans [layers, kv_heads], got "
                f"{table.dtype} of shape {table.shape}"
            )
        object.__setattr__(self, "pattern", tuple(map(tuple, table.tolist())))

    @property
    def capacity(self) -> int:
        return self.retrieval.capacity

    @property
    def limit(self) -> int | None:
        return self.retrieval.limit

    def check(self, tokens: int) -> None:
        """Raises `CacheFull` where a row of so many tokens does not fit."""
        self.retrieval.check(tokens)

    def by_layer(self, layers: int, kv_heads: int) -> tuple[LayerPolicy, ...]:
        if (found := (len(self.pattern), len(self.pattern[0]))) != (layers, kv_heads):
            raise ValueError(
                f"the pattern is for {found[0]} layers of {found[1]} KV heads, this model has "
                f"{layers} of {kv_heads}: use a pattern that was made for it"
            )
        return tuple(self._of(heads) for heads in self.pattern)

    def _of(self, heads: tuple[bool, ...]) -> LayerPolicy:
        if all(heads):
            return self.retrieval
        return SplitHeads(self.retrieval, self.streaming, heads) if any(heads) else self.streaming


@dataclasses.dataclass(frozen=True)
class SplitHeads:
    """The policy of one layer that has heads of both kinds.

    Attributes:
        retrieval, streaming: see `HeadSplit`.
        heads: which KV heads are retrieval heads. Of a cache with a multiple of as many heads,
            each device of a mesh has so many.
    """

    retrieval: LayerPolicy
    streaming: LayerPolicy
    heads: tuple[bool, ...]

    @property
    def kv_dtype(self) -> str | None:
        return self.retrieval.kv_dtype

    @property
    def capacity(self) -> int:
        return self.retrieval.capacity

    @property
    def reach(self) -> int:
        return max(self.retrieval.reach, self.streaming.reach)

    @property
    def limit(self) -> int | None:
        return self.retrieval.limit

    def check(self, tokens: int) -> None:
        """Raises `CacheFull` where a row of so many tokens does not fit."""
        self.retrieval.check(tokens)

    def init(
        self, *, batch: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
    ) -> "SplitCache":
        """Two empty caches, over the heads of each kind."""
        devices, rest = divmod(kv_heads, len(self.heads))
        if rest:
            raise ValueError(f"{kv_heads} KV heads are not those of a pattern of {len(self.heads)}")

        def cache(policy: LayerPolicy, of: bool) -> Cache:
            heads = devices * self.heads.count(of)
            return policy.init(batch=batch, kv_heads=heads, head_dim=head_dim, dtype=dtype)

        return SplitCache(cache(self.retrieval, True), cache(self.streaming, False), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitCache:
    """One layer's two caches, over disjoint KV heads. Heads keep their order within each."""

    retrieval: Cache
    streaming: Cache
    policy: SplitHeads = dataclasses.field(metadata=dict(static=True))

    parts: ClassVar = ("retrieval", "streaming")

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
        """See `Cache.attend`: each kind of heads by its own cache."""
        kinds = np.asarray(self.policy.heads)
        group = q.shape[2] // len(kinds)
        outs, caches, order = [], {}, []
        for name in self.parts:
            own = np.flatnonzero(kinds == (name == "retrieval"))
            queries = (own[:, None] * group + np.arange(group)).reshape(-1)
            sinks, slopes = scores.sink_logits, scores.alibi_slopes
            out, caches[name] = getattr(self, name).attend(
                taken(q, queries, 2),
                taken(k, own, 2),
                taken(v, own, 2),
                positions,
                lengths,
                scores=scores._replace(
                    sink_logits=None if sinks is None else taken(sinks, queries, 0),
                    alibi_slopes=None if slopes is None else taken(slopes, queries, 0),
                ),
                backend=backend,
            )
            outs.append(out)
            order.append(queries)
        back = np.argsort(np.concatenate(order))
        return taken(jnp.concatenate(outs, axis=2), back, 2), dataclasses.replace(self, **caches)


def taken(x: Array, which: np.ndarray, axis: int) -> Array:
    """These entries along an axis: slices where they are in runs, none where they are all."""
    cuts = np.flatnonzero(np.diff(which) != 1) + 1
    runs = [
        jax.lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1, axis=axis)
        for run in np.split(which, cuts)
    ]
    return runs[0] if len(runs) == 1 else jnp.concatenate(runs, axis=axis)
