"""The op in plain jax.numpy: its definition, and what runs where no kernel does."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Segment(NamedTuple):
    """Some of the keys that a query may attend to: those in a cache, or those of the new chunk.

    Attributes:
        k, v: `[B, Hkv, C, D]`, rotated already where the model rotates.
        mask: `[B, T, C]`, true where a query may attend to a key.
        sinks: `[B, S]`, S ≤ C: true where column c < S holds a sink; None: none does.
    """

    k: Float[Array, "B Hkv C D"]
    v: Float[Array, "B Hkv C D"]
    mask: Bool[Array, "B T C"]
    sinks: Bool[Array, "B S"] | None = None


def sink_attention(
    q: Float[Array, "B T H D"],
    segments: Sequence[Segment],
    *,
    q_sinks: Float[Array, "B T H D"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention of T queries a row over the keys of all segments together.

    Args:
        q: rotated queries. H is a multiple of Hkv; consecutive heads share a KV head (GQA).
        segments: the keys and values, one softmax over all of them. Their order is free.
        q_sinks: the queries rotated for the sinks, where that is another angle
            (StreamingLLM's positions inside the cache); None: `q` serves all keys.
        scale: of the scores; None: 1/√D.

    Returns:
        `[B, T, H, D]`, dtype of `q`; softmax and sums in float32. A query that may attend to
        nothing gets zeros.

    Raises:
        ValueError: H is no multiple of Hkv, or the head dimensions differ.
    """
    B, T, H, D = q.shape
    Hkv = segments[0].k.shape[1]
    if H % Hkv or any(s.k.shape[1] != Hkv or s.k.shape[3] != D for s in segments):
        shapes = ", ".join(str(s.k.shape) for s in segments)
        raise ValueError(
            f"queries [B, T, H, D] = {q.shape} do not fit keys [B, Hkv, C, D] = {shapes}: "
            "H must be a multiple of Hkv, and D the same"
        )
    scale = D**-0.5 if scale is None else scale

    def grouped(x: Array) -> Array:
        return (x * scale).astype(x.dtype).reshape(B, T, Hkv, H // Hkv, D).transpose(0, 2, 3, 1, 4)

    q = grouped(q)
    q_sinks = None if q_sinks is None else grouped(q_sinks)
    scores = [_scores(q, q_sinks, s) for s in segments]
    peak = functools.reduce(jnp.maximum, (jnp.max(x, -1, keepdims=True) for x in scores))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = [jnp.exp(x - peak) for x in scores]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    out = sum(_values(w, s.v) for w, s in zip(weights, segments, strict=True))
    out = out / jnp.where(total > 0, total, 1.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D).astype(q.dtype)


def _scores(q: Array, q_sinks: Array | None, s: Segment) -> Float[Array, "B Hkv G T C"]:
    """Minus infinity where the mask hides a key."""
    scores = _dot(q, s.k)
    if q_sinks is not None and s.sinks is not None and s.sinks.shape[1]:
        S = s.sinks.shape[1]
        is_sink = s.sinks[:, None, None, None]
        first = jnp.where(is_sink, _dot(q_sinks, s.k[:, :, :S]), scores[..., :S])
        scores = scores.at[..., :S].set(first)
    return jnp.where(s.mask[:, None, None], scores, -jnp.inf)


# One query a row is a matrix-vector product, bound by the reading of the cache. As a dot, XLA's CPU
# backend first copies the keys and values of every layer to the layout that it likes (25 ms of a
# 45 ms step of SmolLM2); as multiply-and-sum it reads them once where they lie.


def _dot(q: Float[Array, "B Hkv G T D"], k: Float[Array, "B Hkv C D"]) -> Array:
    if q.shape[3] == 1:
        return jnp.sum(q.astype(jnp.float32) * k[:, :, None], axis=-1)[..., None, :]
    return jnp.einsum("bkgtd,bkcd->bkgtc", q, k, preferred_element_type=jnp.float32)


def _values(weights: Float[Array, "B Hkv G T C"], v: Float[Array, "B Hkv C D"]) -> Array:
    if weights.shape[3] == 1:
        return jnp.sum(weights[..., 0, :, None] * v[:, :, None], axis=-2)[..., None, :]
    weights = weights.astype(v.dtype)
    return jnp.einsum("bkgtc,bkcd->bkgtd", weights, v, preferred_element_type=jnp.float32)
