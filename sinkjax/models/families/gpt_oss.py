"""gpt-oss: a learned sink logit per head, every other layer local, experts with a clamped unit,
and matrices of experts in MXFP4, which are dequantised here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sinkjax.models.config import Config, Experts
from sinkjax.models.families.alternating import alternating, alternating_from_gguf
from sinkjax.models.families.common import (
    ATTENTION,
    ENDS,
    OUT_BIAS,
    QKV_BIAS,
    Family,
    Shapes,
    Source,
    Values,
    Weight,
    block,
    common_from_gguf,
    common_from_hf,
    plain,
    transposed,
    whole,
)
from sinkjax.models.positions import RopeScaling

_LIMIT, _ALPHA = 7.0, 1.702  # of the unit; files in GGUF do not say
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _from_hf(hf: Values) -> dict[str, Any]:
    hf = dict(hf)
    if (hf.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        del hf["quantization_config"]
    if (alpha := hf.get("swiglu_alpha", _ALPHA)) != _ALPHA:
        raise ValueError(f"swiglu_alpha {alpha!r} is not supported: expected {_ALPHA}")
    limit = hf.get("swiglu_limit", _LIMIT)
    if not (isinstance(limit, int | float) and limit > 0):
        raise ValueError(f"swiglu_limit must be a number > 0, got {limit!r}")
    bias = bool(hf.get("attention_bias", True))
    common = common_from_hf({"rope_theta": 150_000.0, "rms_norm_eps": 1e-5, "head_dim": 64, **hf})
    if common["activation"] != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not supported: expected 'silu'")
    experts = Experts(
        whole(hf, "num_local_experts", hf.get("num_experts")),
        whole(hf, "num_experts_per_tok", hf.get("experts_per_token")),
        common["intermediate_size"],
    )
    own = {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
        "sink_logits": True,
        "swiglu_limit": float(limit),
        "experts": experts,
    }
    return common | own | alternating({"sliding_window": 128, **hf}, 2)


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    own = {
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "sink_logits": True,
        "swiglu_limit": _LIMIT,
    }
    scaling = common_from_gguf(metadata, shapes, None)["rope_scaling"]
    if scaling is not None:
        # The model was trained with a ramp of which nothing is rounded. The metadata has no word
        # for that, and llama.cpp rounds.
        own["rope_scaling"] = dataclasses.replace(scaling, truncate=False)
    return own | alternating_from_gguf(metadata, 2)


@functools.cache
def _pairs() -> np.ndarray:
    """The two numbers in a byte, the low half first, under each of the 256 scales, as the bits
    of two bfloat16: uint32 `[65536]`, by scale · 256 + byte.

    Nothing is lost: two significant bits and these exponents fit in bfloat16. What exceeds it
    (a scale of 2¹²⁶ or more) becomes infinite, and scale 255 is NaN.
    """
    values = np.array(_FP4 + tuple(-v for v in _FP4))
    scales = np.array([2.0 ** (s - 127) for s in range(255)] + [np.nan])
    byte = np.arange(256)
    pairs = np.stack([values[byte & 15], values[byte >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        table = (scales[:, None, None] * pairs).astype(jnp.bfloat16)
    return table.reshape(-1, 2).view(np.uint32)[:, 0]


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers that a tensor in MXFP4 stands for, exactly. Source: OCP Microscaling 1.0.

    Args:
        blocks: uint8 `[..., n, 16]`, 32 numbers in each block, two in a byte.
        scales: uint8 `[..., n]`, the exponent of each block, plus 127.

    Returns:
        bfloat16 `[..., 32 n]`.
    """
    pairs = _pairs()[scales[..., None].astype(np.uint16) << 8 | blocks]
    return pairs.view(jnp.bfloat16).reshape(*scales.shape[:-1], -1)


_EXPERTS = "model.layers.{}.mlp.experts"
_Choice = Callable[[np.ndarray], np.ndarray]  # some of the output features


def _matrix(path: str, name: str, gguf: str, axis_of: _Choice) -> tuple[Weight, ...]:
    """The rows of a matrix of each expert, in bfloat16 `[X, input, output]` or in MXFP4
    `[X, output, input]`."""

    def from_mxfp4(config: Config, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return dequantised(axis_of(blocks), axis_of(scales)).swapaxes(-1, -2)

    def from_matrix(config: Config, x: np.ndarray) -> np.ndarray:
        return axis_of(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    at, packed = (
        f"blocks.{{}}.mlp.{path}",
        (f"{_EXPERTS}.{name}_blocks", f"{_EXPERTS}.{name}_scales"),
    )
    return (
        Weight(at, Source(packed, from_mxfp4)),
        Weight(
            at, Source((f"{_EXPERTS}.{name}",), from_matrix), transposed(f"blk.{{}}.{gguf}.weight")
        ),
        Weight(
            f"{at}_bias",
            Source((f"{_EXPERTS}.{name}_bias",), lambda config, x: axis_of(x)),
            plain(f"blk.{{}}.{gguf}.bias"),
        ),
    )


FAMILY = Family(
    name="gpt_oss",
    from_hf=_from_hf,
    weights=(
        *ENDS,
        block("attention_norm", plain, "input_layernorm.weight", "attn_norm.weight"),
        block("mlp_norm", plain, "post_attention_layernorm.weight", "post_attention_norm.weight"),
        *ATTENTION,
        *QKV_BIAS,
        *OUT_BIAS,
        block("attention.sink_logits", plain, "self_attn.sinks", "attn_sinks.weight"),
        block("mlp.router", transposed, "mlp.router.weight", "ffn_gate_inp.weight"),
        block("mlp.router_bias", plain, "mlp.router.bias", "ffn_gate_inp.bias"),
        # Features of gate and up take turns.
        *_matrix("gate", "gate_up_proj", "ffn_gate_exps", lambda x: x[:, ::2]),
        *_matrix("up", "gate_up_proj", "ffn_up_exps", lambda x: x[:, 1::2]),
        *_matrix("down", "down_proj", "ffn_down_exps", lambda x: x),
    ),
    architecture="gpt-oss",
    from_gguf=_from_gguf,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "gpt-oss-20b": Config(
        family="gpt_oss",
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        layers=24,
        heads=64,
        kv_heads=8,
        head_dim=64,
        norm_eps=1e-5,
        rope_base=150_000.0,
        rope_scaling=RopeScaling("yarn", 32.0, 4096, truncate=False),
        trained_context=131_072,
        qkv_bias=True,
        out_bias=True,
        sink_logits=True,
        sliding_window=128,
        local_layers=(True, False) * 12,
        mlp_bias=True,
        swiglu_limit=_LIMIT,
        experts=Experts(count=32, chosen=4, intermediate_size=2880),
    ),
}
