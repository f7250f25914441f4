"""StreamingLLM by its definition, in float64 numpy: unrotated keys are kept, and at every step all
of them are rotated anew. Shares no code with the library."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.caches import SinkRing


def rotate(x: np.ndarray, position: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """x `[..., D]` turned to `position` `[...]`: float64 angles, pairs (i, i + R/2) of the first R
    dimensions, R = 2 len(theta)."""
    angle = np.asarray(position, np.float64)[..., None] * theta
    x, rest = np.split(x, [2 * len(theta)], axis=-1)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
            rest,
        ],
        axis=-1,
    )


def frequencies(head_dim: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def kept(t: int, sinks: int, window: int | None) -> np.ndarray:
    """The tokens that token t sees: itself, the newest `window`, the first `sinks`."""
    tokens = np.arange(t + 1)
    if window is None:
        return tokens
    return tokens[(tokens < sinks) | (tokens > t - window)]


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sinks: int,
    window: int | None,
    positions: str,
    theta: np.ndarray | None,
    amplitude: float = 1.0,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    late: tuple[int, np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """One sequence: q `[T, H, D]`, k, v `[T, Hkv, D]`, unrotated; returns `[T, H, D]`.

    `amplitude`: of the rotated dimensions of q and of k (YaRN). `late`: R, and the keys and values
    that a query sees of tokens which came R or more before it.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    T, H, D = q.shape
    group = H // k.shape[1]
    out = np.zeros((T, H, D))
    for t in range(T):
        tokens = kept(t, sinks, window)
        place = np.arange(len(tokens)) if positions == "cache" else tokens
        for h in range(H):
            keys, values, query = k[tokens, h // group], v[tokens, h // group], q[t, h]
            if late is not None:
                old = (t - tokens >= late[0])[:, None]
                keys = np.where(old, late[1][tokens, h // group], keys)
                values = np.where(old, late[2][tokens, h // group], values)
            if theta is not None:
                keys = rotate(keys, place, theta)
                query = rotate(query, place[-1], theta)
                keys[:, : 2 * len(theta)] *= amplitude
                query[: 2 * len(theta)] *= amplitude
            scores = keys @ query * (D**-0.5 if scale is None else scale)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[h] * (place[-1] - place)
            extra = [] if sink_logits is None else [sink_logits[h]]
            peak = max([*scores, *extra])
            weights = np.exp(scores - peak)
            total = weights.sum() + sum(np.exp(x - peak) for x in extra)
            out[t, h] = weights / total @ values
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OracleCache:
    """In the place of a cache: a whole text in one call, by `attention` above."""

    policy: SinkRing = dataclasses.field(metadata=dict(static=True))
    clock: None = None

    def attend(self, q, k, v, positions, lengths=None, *, scores, backend=None):
        ring, theta, amplitude = self.policy, None, 1.0
        if positions is not None:
            positions = positions.within(ring.capacity)
            theta, amplitude = positions.frequencies(), positions.amplitude
        settings = dict(sinks=ring.sinks, window=ring.window, positions=ring.positions)
        settings |= dict(theta=theta, amplitude=amplitude)
        settings |= dict(scale=scores.scale, soft_cap=scores.soft_cap)

        def rows(q, k, v, sink_logits, alibi_slopes):
            heads = dict(sink_logits=sink_logits, alibi_slopes=alibi_slopes)
            heads = {n: None if x is None else np.asarray(x) for n, x in heads.items()}
            out = [
                attention(*map(np.asarray, row), **settings, **heads)
                for row in zip(q, k, v, strict=True)
            ]
            return np.stack(out).astype(np.float32)

        shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        out = jax.pure_callback(rows, shape, q, k, v, scores.sink_logits, scores.alibi_slopes)
        return out, self
