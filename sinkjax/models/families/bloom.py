"""BLOOM and BLOOMZ: ALiBi, and a norm right after the embedding."""

from typing import Any

from sinkjax.models.families.common import (
    Family,
    Shapes,
    Values,
    Weight,
    common_from_hf,
    plain,
    whole,
)
from sinkjax.models.families.gpt import GPT, both, grouped, layer, qkv, switch
from sinkjax.models.positions import Alibi

_OWN = GPT | {
    "alibi": Alibi(),
    "activation": "gelu_tanh",
    "embedding_norm": True,
    "qkv_bias": True,
    "out_bias": True,
}


def _from_hf(hf: Values) -> dict[str, Any]:
    if switch(hf, "apply_residual_connection_post_layernorm", False):
        raise ValueError(
            "apply_residual_connection_post_layernorm True is not supported: expected False"
        )
    hidden = whole(hf, "n_embed", hf.get("hidden_size"))
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": whole(hf, "n_layer", hf.get("num_hidden_layers")),
        "num_attention_heads": whole(hf, "n_head", hf.get("num_attention_heads")),
        "max_position_embeddings": whole(hf, "seq_length", 2048),
        "tie_word_embeddings": switch(hf, "tie_word_embeddings", True),
    }
    eps = {"norm_eps": float(hf.get("layer_norm_epsilon", 1e-5))}
    return common_from_hf({**hf, **sizes}) | _OWN | eps


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    return _OWN


_LAYER = "transformer.h.{}"
FAMILY = Family(
    name="bloom",
    from_hf=_from_hf,
    weights=(
        Weight("embed", plain("transformer.word_embeddings.weight"), plain("token_embd.weight")),
        *both("embed_norm", "transformer.word_embeddings_layernorm", "token_embd_norm"),
        *both("norm", "transformer.ln_f", "output_norm"),
        Weight("head", plain("lm_head.weight"), plain("output.weight")),
        *qkv(f"{_LAYER}.self_attention.query_key_value", grouped),
        *layer(
            _LAYER,
            {
                "attention_norm": ("input_layernorm", "attn_norm"),
                "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
                "attention.out": ("self_attention.dense", "attn_output"),
                "mlp.up": ("mlp.dense_h_to_4h", "ffn_up"),
                "mlp.down": ("mlp.dense_4h_to_h", "ffn_down"),
            },
        ),
    ),
    prefix="transformer.",
    architecture="bloom",
    from_gguf=_from_gguf,
)
