"""StreamingLLM by its definition, in float64 numpy: unrotated keys are kept, and at every step all
of them are rotated anew. Shares no code with the library."""

import numpy as np


def rotate(x: np.ndarray, position: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """x `[..., D]` turned to `position` `[...]` (float64 angles, pairs (i, i + D/2))."""
    angle = np.asarray(position, np.float64)[..., None] * theta
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
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
) -> np.ndarray:
    """One sequence: q `[T, H, D]`, k, v `[T, Hkv, D]`, unrotated; returns `[T, H, D]`."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    T, H, D = q.shape
    group = H // k.shape[1]
    out = np.zeros((T, H, D))
    for t in range(T):
        tokens = kept(t, sinks, window)
        place = np.arange(len(tokens)) if positions == "cache" else tokens
        for h in range(H):
            keys, query = k[tokens, h // group], q[t, h]
            if theta is not None:
                keys = rotate(keys, place, theta)
                query = rotate(query, place[-1], theta)
            scores = keys @ query / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[tokens, h // group]
    return out
