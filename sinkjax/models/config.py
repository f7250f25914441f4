"""What a decoder is made of: sizes and switches, whatever file they came from."""

import dataclasses

from sinkjax.models.positions import RopeScaling, Rotary


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a decoder of the Llama family.

    Attributes:
        family: `llama`, `mistral`, `qwen2` or `qwen3`: whose weight names a checkpoint has.
        vocab_size, hidden_size, intermediate_size, layers: as they say.
        heads, kv_heads, head_dim: of attention; heads is a multiple of kv_heads (GQA).
        norm_eps: of the RMS norms.
        rope_base, rope_scaling: see `Rotary`.
        trained_context: the longest context seen in training, in tokens.
        tied_embeddings: the output head is the embedding.
        qkv_bias, out_bias: the projections into and out of attention have a bias.
        qk_norm: queries and keys are RMS-normalised per head before they are rotated.
        sliding_window: the window that the model was trained to attend to; None: all.

    Raises:
        ValueError: a size below 1, or heads that do not divide.
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
    rope_base: float
    trained_context: int
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        for name in (*sizes, "head_dim", "trained_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide over {self.kv_heads} KV heads")
        _ = self.rotary

    @property
    def rotary(self) -> Rotary:
        return Rotary(self.head_dim, self.rope_base, self.rope_scaling)

    @property
    def fused(self) -> dict[str, dict[str, int]]:
        """The parameters that hold several matrices side by side, and the width of each: one wide
        product runs faster than some narrow ones (8% of a step of SmolLM2 on a CPU)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": {"q": q, "k": kv, "v": kv},
            "qkv_bias": {"q_bias": q, "k_bias": kv, "v_bias": kv},
            "gate_up": {"gate": self.intermediate_size, "up": self.intermediate_size},
        }

    def to_json(self) -> dict:
        """A dict of plain values; `from_json` gives the config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Config":
        values = dict(values)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)
