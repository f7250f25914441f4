"""Rotary positions that never lose precision (integer phase), and their length scalings."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

_TURN = 2.0**32  # one full turn of the phase, in the units of a uint32


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its rotary frequencies to contexts longer than it first saw.

    The fields carry the names of Hugging Face's `config.json`; a kind reads only its own.

    Attributes:
        kind: `linear` (all frequencies divided by `factor`; Chen et al. 2023), `llama3`
            (only the slow ones, blended in between; Llama 3.1), `yarn` (Peng et al. 2023) or
            `longrope` (each divided by a factor of its own; Ding et al. 2024).
        factor: the stretch, > 0.
        original_max_position: the context, in tokens, of the unstretched model.
        low_freq_factor, high_freq_factor: `llama3`: frequencies that turn fewer than the first
            many times in the original context are divided, those above the second are kept.
        beta_fast, beta_slow: `yarn`: the same pair, as counts of turns.
        attention_factor: `yarn`, `longrope`: what cos and sin are multiplied with; None: with
            `yarn` 0.1 ln(factor) + 1, or the ratio given by `mscale` and `mscale_all_dim`, with
            `longrope` √(1 + ln(factor) / ln(original_max_position)).
        truncate: `yarn`: round the ends of the ramp to whole dimensions.
        short_factors, long_factors: `longrope`: what each frequency is divided by, in contexts up
            to the original one, and in longer ones (see `Rotary.within`).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn", "longrope"):
            raise ValueError(
                f"rope scaling {self.kind!r} is not supported: expected linear, llama3, yarn or "
                "longrope. "
                "Scalings that depend on the length (dynamic NTK) have no meaning in a stream "
                "without end; give the model a fixed one, such as linear, instead."
            )
        if not self.factor > 0:
            raise ValueError(f"rope scaling factor must be > 0, got {self.factor}")
        if self.kind != "linear" and self.original_max_position <= 0:
            raise ValueError(
                f"rope scaling {self.kind!r} needs original_max_position_embeddings > 0, "
                f"got {self.original_max_position}"
            )


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021) over pairs (i, i + head_dim/2).

    A position enters as an integer modulo 2³², and so does the angle: with
    step_i = round(θ_i / 2π · 2³²), the phase t · step_i mod 2³² is what uint32 arithmetic gives by
    itself. The difference of two rotations depends on the distance of their tokens alone, at
    token 0 as at token 10¹². In float32, t · θ is off by half a radian at four million tokens.

    Attributes:
        head_dim: the width of a head.
        base: the base of the geometric series of frequencies.
        scaling: None, or how the frequencies are stretched.
        rotary_dim: how many of a head's first dimensions are rotated, even; None: all.
        span: the most tokens between two that meet, sinks included; None: not known. Decides
            between the two sets of factors of `longrope`.
    """

    head_dim: int
    base: float = 10_000.0
    scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    span: int | None = None

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2 or self.dim > self.head_dim:
            raise ValueError(
                f"rotary needs an even number of dimensions, 2 to head_dim {self.head_dim}, "
                f"got {self.dim}"
            )
        if not self.base > 0:
            raise ValueError(f"rotary base must be > 0, got {self.base}")
        s = self.scaling
        if s is not None and s.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(s, name)
                if len(factors) != self.dim // 2 or min(factors) <= 0:
                    raise ValueError(
                        f"rope scaling 'longrope' needs {self.dim // 2} {name} > 0, got {factors}"
                    )

    @property
    def dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def within(self, span: int) -> "Rotary":
        """These positions in a cache where no two tokens that meet are further apart.

        The factors of `longrope` depend on the length of the text. In a stream that has no
        meaning: what counts is how far back a token can look, which a cache fixes for good.
        """
        return dataclasses.replace(self, span=span)

    def frequencies(self) -> np.ndarray:
        """θ, radians a token, float64 `[dim/2]`.

        Raises:
            ValueError: `longrope`, and the span is not known.
        """
        theta = self.base ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        s = self.scaling
        if s is None:
            return theta
        if s.kind == "linear":
            return theta / s.factor
        if s.kind == "longrope":
            if self.span is None:
                raise ValueError("rope scaling 'longrope' depends on the span: see Rotary.within")
            short = self.span <= s.original_max_position
            return theta / np.asarray(s.short_factors if short else s.long_factors)
        turns = s.original_max_position * theta / (2 * math.pi)
        if s.kind == "llama3":
            span = s.high_freq_factor - s.low_freq_factor
            keep = np.clip((turns - s.low_freq_factor) / span, 0, 1)
        else:
            low, high = self._yarn_dim(s, s.beta_fast), self._yarn_dim(s, s.beta_slow)
            if s.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.dim - 1)
            ramp = (np.arange(self.dim // 2) - low) / max(high - low, 0.001)
            keep = 1 - np.clip(ramp, 0, 1)
        return theta * keep + theta / s.factor * (1 - keep)

    def _yarn_dim(self, s: RopeScaling, turns: float) -> float:
        """The pair, as a fractional index, that makes `turns` turns in the original context."""
        ratio = s.original_max_position / (turns * 2 * math.pi)
        return self.dim * math.log(ratio) / (2 * math.log(self.base))

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied with: 1 but for YaRN and LongRoPE."""
        s = self.scaling
        if s is None or s.kind not in ("yarn", "longrope"):
            return 1.0
        if s.attention_factor is not None:
            return s.attention_factor
        if s.kind == "longrope":
            return math.sqrt(1 + math.log(max(s.factor, 1)) / math.log(s.original_max_position))

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

        if s.mscale and s.mscale_all_dim:
            return mscale(s.mscale) / mscale(s.mscale_all_dim)
        return mscale(1.0)

    def rotate(
        self, x: Float[Array, "B T H D"], positions: UInt32[Array, "B T"]
    ) -> Float[Array, "B T H D"]:
        """Turns each head of `x` to its token's position (modulo 2³²). Keeps the dtype of `x`.

        Angles, cos and sin are float32, whatever the dtype of `x`.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"x has head_dim {x.shape[-1]}, this Rotary {self.head_dim}")
        steps = np.round(self.frequencies() / (2 * math.pi) * _TURN).astype(np.uint32)
        phase = jax.lax.bitcast_convert_type(positions[..., None] * steps, jnp.int32)
        angle = phase.astype(jnp.float32) * (2 * math.pi / _TURN)
        cos = self.amplitude * jnp.cos(angle)[:, :, None]
        sin = self.amplitude * jnp.sin(angle)[:, :, None]
        first, second = jnp.split(x[..., : self.dim].astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        kept = [x[..., self.dim :].astype(jnp.float32)] if self.dim < self.head_dim else []
        return jnp.concatenate(turned + kept, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): from each score, the distance times a
    slope of its head's own is subtracted.

    Attributes:
        largest: the slopes fall geometrically, and would reach 2^-largest at the last head of a
            power of two.
        scale: of all slopes.
    """

    largest: float = 8.0
    scale: float = 1.0

    def slopes(self, heads: int) -> np.ndarray:
        """float32 `[heads]`, > 0. Between powers of two: those of the lower one, then every other
        of the higher."""
        lower = 1 << (heads.bit_length() - 1)
        exponents = np.arange(1, lower + 1) / lower
        between = np.arange(1, 2 * (heads - lower), 2) / (2 * lower)
        slopes = 2.0 ** (-self.largest * np.concatenate([exponents, between]))
        return (self.scale * slopes).astype(np.float32)
