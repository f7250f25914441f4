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
            (only the slow ones, blended in between; Llama 3.1) or `yarn` (Peng et al. 2023).
        factor: the stretch, > 0.
        original_max_position: the context, in tokens, of the unstretched model.
        low_freq_factor, high_freq_factor: `llama3`: frequencies that turn fewer than the first
            many times in the original context are divided, those above the second are kept.
        beta_fast, beta_slow: `yarn`: the same pair, as counts of turns.
        attention_factor: `yarn`: what cos and sin are multiplied with; None: 0.1 ln(factor) + 1,
            or the ratio given by `mscale` and `mscale_all_dim`.
        truncate: `yarn`: round the ends of the ramp to whole dimensions.
    """

    kind: Literal["linear", "llama3", "yarn"]
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

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(
                f"rope scaling {self.kind!r} is not supported: expected linear, llama3 or yarn. "
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
        head_dim: even; all of it is rotated.
        base: the base of the geometric series of frequencies.
        scaling: None, or how the frequencies are stretched.
    """

    head_dim: int
    base: float = 10_000.0
    scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"rotary head_dim must be even and positive, got {self.head_dim}")
        if not self.base > 0:
            raise ValueError(f"rotary base must be > 0, got {self.base}")

    def frequencies(self) -> np.ndarray:
        """θ, radians a token, float64 `[head_dim/2]`."""
        theta = self.base ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        s = self.scaling
        if s is None:
            return theta
        if s.kind == "linear":
            return theta / s.factor
        turns = s.original_max_position * theta / (2 * math.pi)
        if s.kind == "llama3":
            span = s.high_freq_factor - s.low_freq_factor
            keep = np.clip((turns - s.low_freq_factor) / span, 0, 1)
        else:
            low, high = self._yarn_dim(s, s.beta_fast), self._yarn_dim(s, s.beta_slow)
            if s.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.head_dim - 1)
            ramp = (np.arange(self.head_dim // 2) - low) / max(high - low, 0.001)
            keep = 1 - np.clip(ramp, 0, 1)
        return theta * keep + theta / s.factor * (1 - keep)

    def _yarn_dim(self, s: RopeScaling, turns: float) -> float:
        """The pair, as a fractional index, that makes `turns` turns in the original context."""
        ratio = s.original_max_position / (turns * 2 * math.pi)
        return self.head_dim * math.log(ratio) / (2 * math.log(self.base))

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied with: 1 but for YaRN."""
        s = self.scaling
        if s is None or s.kind != "yarn":
            return 1.0
        if s.attention_factor is not None:
            return s.attention_factor

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
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
