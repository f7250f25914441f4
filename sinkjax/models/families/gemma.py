"""Gemma 1, and what Gemma 2 and 3 have of it: norms that hold the difference from 1, embeddings
that are scaled by √E and are the output head too, and the tanh form of GELU."""

from typing import Any

from sinkjax.models.families.common import (
    ATTENTION,
    EMBED,
    HEAD,
    MLP,
    OUT_BIAS,
    QKV_BIAS,
    Family,
    Shapes,
    Values,
    Weight,
    block,
    common_from_hf,
    own_values,
    plain,
    plus_one,
    whole,
)


def norm(path: str, hf: str, gguf: str) -> Weight:
    """The row of a norm in a layer. llama.cpp's converter has added the 1 already."""
    return block(path, plus_one, hf)._replace(gguf=plain(f"blk.{{}}.{gguf}"))


NORM = Weight("norm", plus_one("model.norm.weight"), plain("output_norm.weight"))
BODY = (EMBED, NORM, HEAD, *ATTENTION, *QKV_BIAS, *OUT_BIAS, *MLP)


def gemma_from_hf(hf: Values, act: Any) -> dict[str, Any]:
    """The fields of `Config` that all three read alike. Raises ValueError: as `common_from_hf`."""
    if hf.get("use_bidirectional_attention"):
        raise ValueError(
            f"use_bidirectional_attention {hf['use_bidirectional_attention']!r} is not supported: "
            "expected false, for a model that reads a text from its beginning on"
        )
    bias = bool(hf.get("attention_bias", False))
    common = common_from_hf({"tie_word_embeddings": True, "head_dim": 256, **hf, "hidden_act": act})
    scale = common["hidden_size"] ** 0.5
    return common | {"qkv_bias": bias, "out_bias": bias, "embedding_scale": scale}


def gemma_from_gguf(metadata: Values) -> dict[str, Any]:
    scale = whole(own_values(metadata), "embedding_length") ** 0.5
    return {"activation": "gelu_tanh", "embedding_scale": scale}


def _from_hf(hf: Values) -> dict[str, Any]:
    act = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"
    # The first files said "gelu", of a model that was trained with the tanh form.
    return gemma_from_hf(hf, "gelu_pytorch_tanh" if act == "gelu" else act)


def _from_gguf(metadata: Values, shapes: Shapes) -> dict[str, Any]:
    return gemma_from_gguf(metadata)


FAMILY = Family(
    name="gemma",
    from_hf=_from_hf,
    weights=(
        *BODY,
        norm("attention_norm", "input_layernorm.weight", "attn_norm.weight"),
        norm("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    ),
    architecture="gemma",
    from_gguf=_from_gguf,
)
