"""What the families share: how a config is read, and which tensor of a file goes where."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from sinkjax.models.config import Config
from sinkjax.models.positions import RopeScaling, Rotary

Values = Mapping[str, Any]  # of config.json, or the metadata of a GGUF file
Shapes = Mapping[str, tuple[int, ...]]  # of the tensors of a GGUF file


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a table of weight names. `{}` stands for the number of the layer.

    Attributes:
        path: in a `Decoder`.
        hf, gguf: its name in a Hugging Face checkpoint, and in a GGUF file.
        matrix: the files store it as [output, input], a `Decoder` as [input, output].
        heads: the field of `Config` that counts its heads, where llama.cpp permutes its rows.
    """

    path: str
    hf: str
    gguf: str
    matrix: bool = False
    heads: Literal["heads", "kv_heads"] | None = None

    def arrange(self, x: np.ndarray, config: Config, *, permuted: bool) -> np.ndarray:
        """The array as a `Decoder` has it, from the array as a file has it."""
        if permuted and self.heads is not None:
            x = unpermute(x, getattr(config, self.heads))
        return x.T if self.matrix else x


@dataclasses.dataclass(frozen=True)
class Family:
    """What one family of models does its own way.

    Attributes:
        name: its `model_type` in config.json.
        from_hf: fields of `Config` that config.json decides, beyond those that all families have.
        weights: the table of its weights.
        architecture: its `general.architecture` in GGUF, if it has one of its own.
        from_gguf: as `from_hf`, from the metadata and the shapes of the tensors.
        permuted: llama.cpp stores the rows of its q and k for interleaved rotary.
    """

    name: str
    from_hf: Callable[[Values], dict[str, Any]]
    weights: tuple[Weight, ...]
    architecture: str | None = None
    from_gguf: Callable[[Values, Shapes], dict[str, Any]] = lambda metadata, shapes: {}
    permuted: bool = False


def _block(
    path: str,
    hf: str,
    gguf: str,
    matrix: bool = False,
    heads: Literal["heads", "kv_heads"] | None = None,
) -> Weight:
    return Weight(
        f"blocks.{{}}.{path}", f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", matrix, heads
    )


WEIGHTS = (
    Weight("embed", "model.embed_tokens.weight", "token_embd.weight"),
    Weight("norm", "model.norm.weight", "output_norm.weight"),
    Weight("head", "lm_head.weight", "output.weight"),
    _block("attention_norm", "input_layernorm.weight", "attn_norm.weight"),
    _block("attention.q", "self_attn.q_proj.weight", "attn_q.weight", True, "heads"),
    _block("attention.k", "self_attn.k_proj.weight", "attn_k.weight", True, "kv_heads"),
    _block("attention.v", "self_attn.v_proj.weight", "attn_v.weight", True),
    _block("attention.out", "self_attn.o_proj.weight", "attn_output.weight", True),
    _block("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _block("mlp.gate", "mlp.gate_proj.weight", "ffn_gate.weight", True),
    _block("mlp.up", "mlp.up_proj.weight", "ffn_up.weight", True),
    _block("mlp.down", "mlp.down_proj.weight", "ffn_down.weight", True),
)
QKV_BIAS = (
    _block("attention.q_bias", "self_attn.q_proj.bias", "attn_q.bias", heads="heads"),
    _block("attention.k_bias", "self_attn.k_proj.bias", "attn_k.bias", heads="kv_heads"),
    _block("attention.v_bias", "self_attn.v_proj.bias", "attn_v.bias"),
)
OUT_BIAS = (_block("attention.out_bias", "self_attn.o_proj.bias", "attn_output.bias"),)
QK_NORM = (
    _block("attention.q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    _block("attention.k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
)


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order (i, i + D/2) of rotated pairs, from llama.cpp's (2i, 2i + 1)."""
    if x.shape[0] % (2 * heads):
        return x  # misshapen, and reported as such when the model is made
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def common_from_hf(hf: Values) -> dict[str, Any]:
    """The fields of `Config` that every family reads alike from config.json.

    Raises:
        ValueError: a size is missing or no whole number, or a switch has a value that no
            family here computes.
    """
    for key, supported in (("hidden_act", "silu"), ("mlp_bias", False)):
        if hf.get(key, supported) != supported:
            raise ValueError(f"{key} {hf[key]!r} is not supported: expected {supported!r}")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(
            f"weights quantised with {method!r} are not supported: "
            "use the original checkpoint, or a GGUF file"
        )
    # transformers 5 keeps all that concerns rotary in one place, transformers 4 did not.
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    if partial != 1:
        raise ValueError(
            f"partial_rotary_factor {partial} is not supported: expected 1 (all of a head turns)"
        )
    heads, hidden = whole(hf, "num_attention_heads"), whole(hf, "hidden_size")
    context = whole(hf, "max_position_embeddings")
    return {
        "vocab_size": whole(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": whole(hf, "intermediate_size"),
        "layers": whole(hf, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": whole(hf, "num_key_value_heads", heads),
        "head_dim": whole(hf, "head_dim", hidden // max(heads, 1)),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "rope_base": float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        "rope_scaling": _scaling_from_hf(hf, rope, context),
        "trained_context": context,
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }


def _scaling_from_hf(hf: Values, rope: Values, context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    original = (
        rope.get("original_max_position_embeddings")
        or hf.get("original_max_position_embeddings")
        or context
    )
    factor = rope.get("factor")
    own = ["low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"]
    own += ["attention_factor", "mscale", "mscale_all_dim"]
    return RopeScaling(
        kind=kind,
        factor=float(context / original if factor is None else factor),
        original_max_position=int(original),
        **{name: rope[name] for name in own if rope.get(name) is not None},
    )


def window_by_layer(hf: Values) -> int | None:
    """The sliding window of a family whose config says which layers have one.

    Raises:
        ValueError: some layers have one and some do not.
    """
    layers = whole(hf, "num_hidden_layers")
    if kinds := hf.get("layer_types"):
        sliding = sum(kind == "sliding_attention" for kind in kinds)
    elif hf.get("use_sliding_window", False):
        sliding = max(0, layers - hf.get("max_window_layers", 0))
    else:
        sliding = 0
    if 0 < sliding < layers:
        raise ValueError(
            f"{sliding} of {layers} layers with a sliding window is not supported: "
            "expected all (max_window_layers 0) or none (use_sliding_window false)"
        )
    return whole(hf, "sliding_window") if sliding else None


def common_from_gguf(
    metadata: Values, shapes: Shapes, rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """The fields of `Config` that every architecture reads alike from GGUF metadata.

    Raises:
        ValueError: as `common_from_hf`.
    """
    own = _own(metadata)
    if own.get("expert_count"):
        raise ValueError(f"a mixture of {own['expert_count']} experts is not supported")
    heads, hidden = whole(own, "attention.head_count"), whole(own, "embedding_length")
    head_dim = whole(own, "attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(f"{key} {own[key]} is not supported: expected {head_dim}, as of keys")
    if "token_embd.weight" not in shapes:
        raise ValueError("the file has no tensor 'token_embd.weight'")
    base = float(own.get("rope.freq_base", 10_000.0))
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": whole(own, "feed_forward_length"),
        "layers": whole(own, "block_count"),
        "heads": heads,
        "kv_heads": whole(own, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "norm_eps": float(own.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_base": base,
        "rope_scaling": _scaling_from_gguf(own, head_dim, base, rope_factors),
        "trained_context": whole(own, "context_length"),
        "tied_embeddings": "output.weight" not in shapes,
        "sliding_window": own.get("attention.sliding_window") or None,
    }


def _own(metadata: Values) -> dict[str, Any]:
    """The entries of the file's own architecture, without its name in front of each."""
    prefix = f"{metadata['general.architecture']}."
    return {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}


def _scaling_from_gguf(
    own: Values, head_dim: int, base: float, factors: np.ndarray | None
) -> RopeScaling | None:
    kind = own.get("rope.scaling.type", "none")
    original = int(own.get("rope.scaling.original_context_length", 0))
    if factors is not None:
        return _llama3_scaling(factors, head_dim, base, original or 8192)
    if kind == "none":
        return None
    factor = float(own.get("rope.scaling.factor", 0.0))
    scaling = RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position=original or whole(own, "context_length"),
        beta_fast=own.get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=own.get("rope.scaling.yarn_beta_slow", 1.0),
    )
    times = own.get("rope.scaling.attn_factor", own.get("rope.scaling.yarn_attn_factor", 1.0))
    if kind == "yarn" and times != 1:  # llama.cpp multiplies with it what YaRN gives by itself
        usual = 0.1 * np.log(factor) + 1 if factor > 1 else 1.0
        return dataclasses.replace(scaling, attention_factor=float(times * usual))
    return scaling


def _llama3_scaling(
    factors: np.ndarray, head_dim: int, base: float, original: int
) -> RopeScaling | None:
    """The scaling of Llama 3.1 and later, of which GGUF has only the outcome.

    Raises:
        ValueError: no `llama3` scaling with its usual parameters has this outcome.
    """
    if factors.shape == (head_dim // 2,) and np.all(np.isfinite(factors)) and factors.min() > 0:
        if np.all(factors == 1):
            return None
        # Llama 3.1, 3.2 and 3.3 differ in the factor alone; it is that of the slowest pair.
        guess = RopeScaling("llama3", float(factors[-1]), original)
        plain = base ** (-np.arange(0, head_dim, 2) / head_dim)
        scaled = Rotary(head_dim, base, guess).frequencies()
        if np.allclose(plain / scaled, factors, rtol=1e-4, atol=0):
            return guess
    raise ValueError(
        "the frequency factors in 'rope_freqs.weight' are not those of Llama 3.1 to 3.3 "
        f"(original context {original}, low and high frequency factors 1 and 4): "
        "this scaling is not supported; use the model's safetensors instead"
    )


def whole(values: Values, key: str, default: int | None = None) -> int:
    """The whole number that `values` has at `key`, which may be a list that repeats it.

    Raises:
        ValueError: there is none, and no default, or it is something else.
    """
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"the configuration has no {key!r}")
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if type(value) is not int:  # a bool is no size
        raise ValueError(f"{key} must be one whole number for all layers, got {value!r}")
    return value
