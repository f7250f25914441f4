"""What the families share: how a config is read, and which tensor of a file goes where."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sinkjax.models.config import Config, Experts
from sinkjax.models.positions import RopeScaling, Rotary

Values = Mapping[str, Any]  # of config.json, or the metadata of a GGUF file
Shapes = Mapping[str, tuple[int, ...]]  # of the tensors of a GGUF file

# How config.json names what `Config.activation` names.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Source(NamedTuple):
    """What a weight is made of in one kind of file.

    Attributes:
        names: of tensors. `{}` stands for the number of the layer, `{x}` for that of each expert.
        make: from the config and the tensors (those of the experts stacked along a new first
            axis) to the array as a `Decoder` has it.
    """

    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


class Weight(NamedTuple):
    """One row of a table of weights. A weight may have several rows, for files that differ: the
    first whose tensors are all there is taken.

    Attributes:
        path: in a `Decoder`; `{}` stands for the number of the layer.
        hf, gguf: in a Hugging Face checkpoint, and in a GGUF file; None: not in such files.
    """

    path: str
    hf: Source | None
    gguf: Source | None = None


def plain(name: str) -> Source:
    """The tensor as it is."""
    return Source((name,), lambda config, x: x)


def transposed(name: str) -> Source:
    """A matrix, or one for each expert: files have [output, input], a `Decoder` the reverse."""
    return Source((name,), lambda config, x: x.swapaxes(-1, -2))


def plus_one(name: str) -> Source:
    """A norm whose file has the difference from 1 (Gemma)."""
    return Source((name,), lambda config, x: 1 + x.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Family:
    """What one family of models does its own way.

    Attributes:
        name: its `model_type` in config.json.
        from_hf: the fields of `Config`, from config.json.
        weights: the table of its weights.
        prefix: of most names in a Hugging Face checkpoint; some files leave it out.
        ignored: a pattern of tensors that the model does not need.
        architecture: its `general.architecture` in GGUF, if it has one of its own.
        from_gguf: the fields of `Config` that are not as `common_from_gguf` says, from the
            metadata and the shapes of the tensors.
    """

    name: str
    from_hf: Callable[[Values], dict[str, Any]]
    weights: tuple[Weight, ...]
    prefix: str = "model."
    ignored: str | None = None
    architecture: str | None = None
    from_gguf: Callable[[Values, Shapes], dict[str, Any]] = lambda metadata, shapes: {}


class FileWeights(Mapping[str, np.ndarray]):
    """The weights of a `Decoder` by name, each made from the tensors of a file when it is asked
    for: no more than one need be in memory.

    Tensors that the table does not know are there under their own names, for
    `Decoder.from_weights` to report.

    Args:
        config: of the model.
        tensors: of the file, by name.
        rows: path and source of each weight.
        prefix: left out of the names where the file does.
        ignored: whether a tensor is not needed.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, np.ndarray],
        rows: list[tuple[str, Source]],
        *,
        prefix: str = "",
        ignored: Callable[[str], bool],
    ):
        self._config, self._tensors = config, tensors
        self._made: dict[str, tuple[Source, list[list[str]]]] = {}
        experts = config.experts.count if config.experts else 0
        used = set()

        def found(name: str) -> str:
            return name if name in tensors else name.removeprefix(prefix)

        for pattern, source in rows:
            for layer in range(config.layers) if "{}" in pattern else (0,):
                path = pattern.format(layer)
                names = [
                    [
                        found(name.format(layer, x=x))
                        for x in (range(experts) if "{x}" in name else (0,))
                    ]
                    for name in source.names
                ]
                flat = [name for several in names for name in several]
                if path not in self._made and flat and all(name in tensors for name in flat):
                    used.update(flat)
                    self._made[path] = source, names
        self._surplus = {n: None for n in tensors if n not in used and not ignored(n)}
        if config.tied_embeddings:
            self._made.pop("head", None)  # a copy of the embedding, or never used

    def __getitem__(self, path: str) -> np.ndarray:
        if path not in self._made:
            return self._tensors[path]
        source, names = self._made[path]
        arrays = []
        for pattern, several in zip(source.names, names, strict=True):
            parts = [self._tensors[name] for name in several]
            arrays.append(np.stack(parts) if "{x}" in pattern else parts[0])
        return source.make(self._config, *arrays)

    def __contains__(self, path: object) -> bool:  # Mapping's own would load the tensor
        return path in self._made or path in self._surplus

    def __iter__(self) -> Iterator[str]:
        yield from self._made
        yield from self._surplus

    def __len__(self) -> int:
        return len(self._made) + len(self._surplus)


def block(path: str, make: Callable[[str], Source], hf: str, gguf: str | None = None) -> Weight:
    """A row of a layer whose names are as in Llama."""
    return Weight(
        f"blocks.{{}}.{path}",
        make(f"model.layers.{{}}.{hf}"),
        None if gguf is None else make(f"blk.{{}}.{gguf}"),
    )


EMBED = Weight("embed", plain("model.embed_tokens.weight"), plain("token_embd.weight"))
HEAD = Weight("head", plain("lm_head.weight"), plain("output.weight"))
ENDS = (EMBED, Weight("norm", plain("model.norm.weight"), plain("output_norm.weight")), HEAD)
ATTENTION = (
    block("attention.q", transposed, "self_attn.q_proj.weight", "attn_q.weight"),
    block("attention.k", transposed, "self_attn.k_proj.weight", "attn_k.weight"),
    block("attention.v", transposed, "self_attn.v_proj.weight", "attn_v.weight"),
    block("attention.out", transposed, "self_attn.o_proj.weight", "attn_output.weight"),
)
MLP = (
    block("mlp.gate", transposed, "mlp.gate_proj.weight", "ffn_gate.weight"),
    block("mlp.up", transposed, "mlp.up_proj.weight", "ffn_up.weight"),
    block("mlp.down", transposed, "mlp.down_proj.weight", "ffn_down.weight"),
)
NORMS = (
    block("attention_norm", plain, "input_layernorm.weight", "attn_norm.weight"),
    block("mlp_norm", plain, "post_attention_layernorm.weight", "ffn_norm.weight"),
)
WEIGHTS = ENDS + NORMS + ATTENTION + MLP
QKV_BIAS = (
    block("attention.q_bias", plain, "self_attn.q_proj.bias", "attn_q.bias"),
    block("attention.k_bias", plain, "self_attn.k_proj.bias", "attn_k.bias"),
    block("attention.v_bias", plain, "self_attn.v_proj.bias", "attn_v.bias"),
)
OUT_BIAS = (block("attention.out_bias", plain, "self_attn.o_proj.bias", "attn_output.bias"),)
MLP_BIAS = (
    block("mlp.gate_bias", plain, "mlp.gate_proj.bias", "ffn_gate.bias"),
    block("mlp.up_bias", plain, "mlp.up_proj.bias", "ffn_up.bias"),
    block("mlp.down_bias", plain, "mlp.down_proj.bias", "ffn_down.bias"),
)
QK_NORM = (
    block("attention.q_norm", plain, "self_attn.q_norm.weight", "attn_q_norm.weight"),
    block("attention.k_norm", plain, "self_attn.k_norm.weight", "attn_k_norm.weight"),
)


def permuted(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """The table of an architecture whose q and k llama.cpp stores for interleaved rotary."""

    def undone(weight: Weight) -> Weight:
        heads = {"q": "heads", "k": "kv_heads"}.get(
            weight.path.removeprefix("blocks.{}.attention.").removesuffix("_bias")
        )
        if heads is None or weight.gguf is None:
            return weight
        make = weight.gguf.make
        return weight._replace(
            gguf=weight.gguf._replace(
                make=lambda config, x: make(config, unpermute(x, getattr(config, heads)))
            )
        )

    return tuple(map(undone, weights))


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order (i, i + D/2) of rotated pairs, from llama.cpp's (2i, 2i + 1)."""
    if x.shape[0] % (2 * heads):
        return x  # misshapen, and reported as such when the model is made
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def common_from_hf(hf: Values) -> dict[str, Any]:
    """The fields of `Config` that most families read alike from config.json.

    Raises:
        ValueError: a size is missing or no whole number, or a switch has a value that no
            family here computes.
    """
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(
            f"weights quantised with {method!r} are not supported: "
            "use the original checkpoint, or a GGUF file"
        )
    # transformers 5 keeps all that concerns rotary in one place, transformers 4 did not.
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    heads, hidden = whole(hf, "num_attention_heads"), whole(hf, "hidden_size")
    head_dim = whole(hf, "head_dim", hidden // max(heads, 1))
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    context = whole(hf, "max_position_embeddings")
    return {
        "vocab_size": whole(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": whole(hf, "intermediate_size"),
        "layers": whole(hf, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": whole(hf, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "rope_base": float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        "rope_scaling": scaling_from_hf(hf, rope, context),
        "rotary_dim": None if partial == 1 else int(head_dim * partial),
        "trained_context": context,
        "activation": activation(hf.get("hidden_act", "silu")),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }


def activation(name: Any) -> str:
    """How `Config` names what config.json names `hidden_act`. Raises ValueError: unknown."""
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"hidden_act {name!r} is not supported: expected one of {known}")
    return _ACTIVATIONS[name]


def scaling_from_hf(hf: Values, rope: Values, context: int) -> RopeScaling | None:
    """The scaling that the values of `rope_scaling` or `rope_parameters` describe."""
    kind: Any = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "su":  # as Phi-3 first called it
        kind = "longrope"
    original = (
        rope.get("original_max_position_embeddings")
        or hf.get("original_max_position_embeddings")
        or context
    )
    factor = rope.get("factor")
    own = ["low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"]
    own += ["attention_factor", "mscale", "mscale_all_dim"]
    longrope: dict[str, Any] = {
        f"{name}s": tuple(map(float, rope[name]))
        for name in ("short_factor", "long_factor")
        if rope.get(name) is not None
    }
    return RopeScaling(
        kind=kind,
        factor=float(context / original if factor is None else factor),
        original_max_position=int(original),
        **{name: rope[name] for name in own if rope.get(name) is not None},
        **longrope,
    )


def window_by_layer(hf: Values) -> dict[str, Any]:
    """`sliding_window` and `local_layers` of a family whose config says which layers have one."""
    layers = whole(hf, "num_hidden_layers")
    if kinds := hf.get("layer_types"):
        if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ValueError(
                "layer_types must say sliding_attention or full_attention for each of "
                f"{layers} layers, got {', '.join(sorted(set(kinds)))} for {len(kinds)}"
            )
        local = tuple(kind == "sliding_attention" for kind in kinds)
    elif hf.get("use_sliding_window", False):
        local = tuple(layer >= hf.get("max_window_layers", 0) for layer in range(layers))
    else:
        local = (False,) * layers
    return windows(hf, local)


def windows(hf: Values, local: tuple[bool, ...]) -> dict[str, Any]:
    """`sliding_window` and `local_layers` where these layers have the window of config.json."""
    if not any(local) or hf.get("sliding_window") is None:
        return {"sliding_window": None}
    window = whole(hf, "sliding_window")
    return {"sliding_window": window, "local_layers": None if all(local) else local}


def common_from_gguf(
    metadata: Values,
    shapes: Shapes,
    rope_factors: np.ndarray | None,
    longrope: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The fields of `Config` that every architecture reads alike from GGUF metadata.

    Raises:
        ValueError: as `common_from_hf`.
    """
    own = own_values(metadata)
    heads, hidden = whole(own, "attention.head_count"), whole(own, "embedding_length")
    head_dim = whole(own, "attention.key_length", hidden // max(heads, 1))
    if (value_dim := own.get("attention.value_length", head_dim)) != head_dim:
        raise ValueError(
            f"attention.value_length {value_dim} is not supported: expected {head_dim}, as of keys"
        )
    rotary_dim = own.get("rope.dimension_count", head_dim)
    if "token_embd.weight" not in shapes:
        raise ValueError("the file has no tensor 'token_embd.weight'")
    base = float(own.get("rope.freq_base", 10_000.0))
    experts = None
    if count := own.get("expert_count"):
        experts = Experts(
            count,
            whole(own, "expert_used_count"),
            whole(own, "expert_feed_forward_length", own.get("feed_forward_length")),
        )
    eps = own.get("attention.layer_norm_rms_epsilon", own.get("attention.layer_norm_epsilon", 1e-6))
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": whole(own, "feed_forward_length"),
        "layers": whole(own, "block_count"),
        "heads": heads,
        "kv_heads": whole(own, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "norm_eps": float(eps),
        "rope_base": base,
        "rope_scaling": _scaling_from_gguf(own, rotary_dim, base, rope_factors, longrope),
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
        "experts": experts,
        "trained_context": whole(own, "context_length"),
        "tied_embeddings": "output.weight" not in shapes,
        "sliding_window": own.get("attention.sliding_window") or None,
    }


def own_values(metadata: Values) -> dict[str, Any]:
    """The entries of the file's own architecture, without its name in front of each."""
    prefix = f"{metadata['general.architecture']}."
    return {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}


def _scaling_from_gguf(
    own: Values,
    head_dim: int,
    base: float,
    factors: np.ndarray | None,
    longrope: tuple[np.ndarray, np.ndarray] | None,
) -> RopeScaling | None:
    kind = own.get("rope.scaling.type", "none")
    original = int(own.get("rope.scaling.original_context_length", 0))
    if factors is not None:
        return _llama3_scaling(factors, head_dim, base, original or 8192)
    if longrope is not None:  # of which most files do not name the kind
        context = whole(own, "context_length")
        short, long = (tuple(map(float, each)) for each in longrope)
        return RopeScaling(
            kind="longrope",
            factor=context / (original or context),
            original_max_position=original or context,
            attention_factor=own.get("rope.scaling.attn_factor"),
            short_factors=short,
            long_factors=long,
        )
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
