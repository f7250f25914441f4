"""GPT-NeoX: Pythia, GPT-NeoX-20B, RedPajama-INCITE, Dolly, StableLM Alpha."""

from typing import Any

from sinkjax.models.config import Config
from sinkjax.models.families.common import (
    Family,
    Shapes,
    Values,
    Weight,
    common_from_hf,
    own_values,
    plain,
)
from sinkjax.models.families.gpt import GPT, both, grouped, layer, qkv, switch


def _from_hf(hf: Values) -> dict[str, Any]:
    # transformers 5 has its own names for these two, and for all families the same.
    older = {
        "rope_theta": hf.get("rotary_emb_base"),
        "partial_rotary_factor": hf.get("rotary_pct", 0.25),
        "hidden_act": "gelu",
    }
    bias = switch(hf, "attention_bias", True)
    return (
        common_from_hf(older | dict(hf))
        | GPT
        | {
            "norm_eps": float(hf.get("layer_norm_eps", 1e-5)),
            "parallel": switch(hf, "use_parallel_residual", True),
            "qkv_bias": bias,
            "out_bias": bias,
        }
    )


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    return GPT | {
        # The metadata does not say: Pythia's. GPT-NeoX-20B has the tanh form, very near to it.
        "activation": "gelu",
        "parallel": own_values(metadata).get("use_parallel_residual", True),
        "qkv_bias": "blk.0.attn_qkv.bias" in shapes,
        "out_bias": "blk.0.attn_output.bias" in shapes,
    }


_LAYER = "gpt_neox.layers.{}"
FAMILY = Family(
    name="gpt_neox",
    from_hf=_from_hf,
    weights=(
        Weight("embed", plain("gpt_neox.embed_in.weight"), plain("token_embd.weight")),
        *both("norm", "gpt_neox.final_layer_norm", "output_norm"),
        Weight("head", plain("embed_out.weight"), plain("output.weight")),
        Weight("head", plain("lm_head.weight")),
        *qkv(f"{_LAYER}.attention.query_key_value", grouped),
        *layer(
            _LAYER,
            {
                "attention_norm": ("input_layernorm", "attn_norm"),
                "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
                "attention.out": ("attention.dense", "attn_output"),
                "mlp.up": ("mlp.dense_h_to_4h", "ffn_up"),
                "mlp.down": ("mlp.dense_4h_to_h", "ffn_down"),
            },
        ),
    ),
    prefix="gpt_neox.",
    ignored=r".*\.attention\.(bias|masked_bias)",
    architecture="gptneox",
    from_gguf=_from_gguf,
)

# Sizes alone, to ask a compiler about a model without its weights.
PRESETS = {
    "pythia-6.9b": Config(
        family="gpt_neox",
        vocab_size=50_432,
        hidden_size=4096,
        intermediate_size=16_384,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        rotary_dim=32,
        trained_context=2048,
        norm="layer",
        norm_bias=True,
        parallel=True,
        qkv_bias=True,
        out_bias=True,
        activation="gelu",
        gated=False,
        mlp_bias=True,
    ),
}
