"""What a decoder is made of: sizes and switches, whatever file they came from."""

import dataclasses
from typing import Literal

from sinkjax.models.positions import Alibi, RopeScaling, Rotary

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of an MLP.

    Attributes:
        count: of experts in a layer.
        chosen: how many of them each token goes through.
        intermediate_size: of each.
        normalise: the shares of the chosen add up to 1; else they are those among all experts.
        layers: which layers have one; None: all. The others have an MLP.

    Raises:
        ValueError: a size below 1, or more are chosen than there are.
    """

    count: int
    chosen: int
    intermediate_size: int
    normalise: bool = True
    layers: tuple[bool, ...] | None = None

    def __post_init__(self):
        if not 1 <= self.chosen <= self.count or self.intermediate_size < 1:
            raise ValueError(
                f"{self.chosen} of {self.count} experts of width {self.intermediate_size}: "
                "expected 1 ≤ chosen ≤ count and a width ≥ 1"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and switches of a decoder. What is not given is as in Llama.

    Attributes:
        family: a name in `families.FAMILIES`: whose weight names a checkpoint has.
        vocab_size, hidden_size, intermediate_size, layers: as they say.
        heads, kv_heads, head_dim: of attention; heads is a multiple of kv_heads (GQA).
        norm_eps: of all norms.
        trained_context: the longest context seen in training, in tokens.
        rope_base, rope_scaling: see `Rotary`.
        rotary_dim: how many of a head's first dimensions are rotated; None: all.
        local_rope_base: the base in the layers with a sliding window, which then have no scaling
            (Gemma 3); None: as everywhere.
        alibi: linear biases in the place of rotary positions.
        norm: of the hidden states: over their root mean square, or a LayerNorm.
        norm_bias: norms have a bias.
        qk_norm: queries and keys are RMS-normalised per head before they are rotated.
        parallel: attention and MLP read the same hidden state, and both are added to it.
        shared_norm: with `parallel`: they read it through the same norm.
        post_norms: what attention and MLP give is normalised before it is added (Gemma 2).
        qkv_bias, out_bias: the projections into and out of attention have a bias.
        qkv_clip: queries, keys and values are clipped to ± this (MPT).
        attention_scale: of the scores; None: 1/√head_dim.
        attention_soft_cap: scores become cap · tanh(score / cap) (Gemma 2).
        sink_logits: a learned logit per head takes its part of each softmax (gpt-oss).
        sliding_window: the window that the model was trained to attend to; None: all.
        local_layers: which layers have that window; None: all.
        activation: of the MLP; `gelu` is the exact one.
        gated: the MLP is down(activation(gate x) · up x), else down(activation(up x)).
        mlp_bias: its products have a bias; with experts, so has the router.
        swiglu_limit: the gated unit of gpt-oss, clamped to ± this; None: the plain one.
        experts: a mixture of experts in the place of the MLP.
        embedding_scale: what embeddings are multiplied with.
        embedding_norm: they are normalised (BLOOM).
        logit_soft_cap: as `attention_soft_cap`, of the logits.
        head_bias: the output head has a bias (GPT-J).
        tied_embeddings: the output head is the embedding.

    Raises:
        ValueError: a size below 1, heads that do not divide, or switches that exclude each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    trained_context: int
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    local_rope_base: float | None = None
    alibi: Alibi | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    qk_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qkv_clip: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    sink_logits: bool = False
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] | None = None
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    mlp_bias: bool = False
    swiglu_limit: float | None = None
    experts: Experts | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    logit_soft_cap: float | None = None
    head_bias: bool = False
    tied_embeddings: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        for name in (*sizes, "head_dim", "trained_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide over {self.kv_heads} KV heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        listed = {"local_layers": self.local_layers}
        if self.experts is not None:
            listed["experts.layers"] = self.experts.layers
        for name, layers in listed.items():
            if layers is not None and len(layers) != self.layers:
                raise ValueError(f"{name} lists {len(layers)} layers of a model of {self.layers}")
        if self.local_layers is not None and self.sliding_window is None:
            raise ValueError("local_layers need a sliding_window")
        for layer in range(self.layers):
            _ = self.rotary(layer)

    def window(self, layer: int) -> int | None:
        """The window that this layer was trained to attend to; None: all."""
        local = self.local_layers is None or self.local_layers[layer]
        return self.sliding_window if local else None

    def rotary(self, layer: int) -> Rotary | None:
        """The positions of this layer; None with ALiBi."""
        if self.alibi is not None:
            return None
        base, scaling = self.rope_base, self.rope_scaling
        if self.local_rope_base is not None and self.window(layer) is not None:
            base, scaling = self.local_rope_base, None
        return Rotary(self.head_dim, base, scaling, self.rotary_dim)

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts in the place of an MLP."""
        if self.experts is None:
            return False
        return self.experts.layers is None or self.experts.layers[layer]

    def to_json(self) -> dict:
        """A dict of plain values; `from_json` gives the config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Config":
        def tuples(held: dict) -> dict:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}

        values = tuples(values)
        for name, kind in (("rope_scaling", RopeScaling), ("alibi", Alibi), ("experts", Experts)):
            if values.get(name) is not None:
                values[name] = kind(**tuples(values[name]))
        return cls(**values)
