"""From the scores of the next token to the token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields.

    Attributes:
        repetition_penalty: > 0; positive scores of recent tokens are divided by it, negative ones
            multiplied (Keskar et al. 2019). 1: off.
        repetition_window: how many of the newest tokens (the prompt's too) are recent. Bounded,
            since in a stream without end every token has been seen.
        temperature: ≥ 0; 0 takes the likeliest token, and no other field below matters.
        top_k: only the k likeliest; 0: off.
        top_p: only the likeliest that together reach this probability, in (0, 1]; 1: off.
        min_p: only those at least this times as likely as the likeliest, in [0, 1); 0: off.

    Raises:
        ValueError: a value outside its range.
    """

    repetition_penalty: float = 1.0
    repetition_window: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        wrong = [
            f"{name} must be {expected}, got {getattr(self, name)}"
            for name, expected, good in (
                ("repetition_penalty", "> 0", self.repetition_penalty > 0),
                ("repetition_window", "≥ 1", self.repetition_window >= 1),
                ("temperature", "≥ 0", self.temperature >= 0),
                ("top_k", "≥ 0", self.top_k >= 0),
                ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
                ("min_p", "in [0, 1)", 0 <= self.min_p < 1),
            )
            if not good
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def memory(self) -> int:
        """How many recent tokens a row must keep for the penalty."""
        return self.repetition_window if self.repetition_penalty != 1 else 0


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    recent: Int32[Array, "B N"],
    seeds: UInt32[Array, " B"],
    positions: UInt32[Array, " B"],
) -> Int32[Array, " B"]:
    """One token a row.

    Args:
        logits: scores, float32.
        sampling: how.
        recent: the newest tokens of each row, for the repetition penalty; −1: none.
        seeds, positions: the draw of a row is a function of these two alone, so that a row draws
            the same in any batch, and a resumed stream what it would have drawn.
    """
    if sampling.memory:
        logits = jax.vmap(_penalised, in_axes=(0, 0, None))(
            logits, recent, sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _filtered(logits / sampling.temperature, sampling)
    keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(seeds, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _penalised(logits: Float[Array, " V"], recent: Int32[Array, " N"], penalty: float) -> Array:
    at = jnp.where(recent < 0, logits.shape[0], recent)
    old = logits[jnp.minimum(at, logits.shape[0] - 1)]
    return logits.at[at].set(jnp.where(old > 0, old / penalty, old * penalty), mode="drop")


def _filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        shares = jax.nn.softmax(logits)
        ordered = jnp.sort(shares, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(shares < least, -jnp.inf, logits)
    if sampling.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits
