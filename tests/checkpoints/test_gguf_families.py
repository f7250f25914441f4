"""GGUF files as llama.cpp's converter writes them, made from the small models of the families."""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from sinkjax.checkpoints import open_checkpoint

DATA = Path(__file__).parents[1] / "data" / "families"


def fused_order(heads: int, kv_heads: int, head_dim: int) -> list[int]:
    """Where the rows of all queries, then all keys, then all values lie in a tensor that has, for
    each KV head, its queries, its key and its value."""
    group = heads // kv_heads
    starts = [h // group * (group + 2) + h % group for h in range(heads)]
    for place in (group, group + 1):
        starts += [kv * (group + 2) + place for kv in range(kv_heads)]
    return [start * head_dim + i for start in starts for i in range(head_dim)]


def write(
    path: Path, folder: Path, architecture: str, kv_heads: int, fused: str, metadata: dict
) -> None:
    """A GGUF file of the model in `folder`.

    Names of tensors are those that llama.cpp's own table gives. `fused` is part of the name of the
    tensors whose rows its converter sorts. `metadata` is without the architecture's name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{architecture}.{key}", value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], metadata["block_count"])
    heads, width = metadata["attention.head_count"], metadata["embedding_length"]
    order = fused_order(heads, kv_heads, width // heads)
    with safe_open(folder / "model.safetensors", framework="flax") as file:
        for name in file.keys():
            x = np.asarray(file.get_tensor(name), np.float32)
            x = x[order] if fused in name else x
            plain = name.removeprefix("transformer.") if architecture == "bloom" else name
            found = names.get_name(plain, try_suffixes=(".weight", ".bias"))
            if found is not None:  # else a buffer, such as the causal mask in Pythia's files
                writer.add_tensor(found, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sizes(width: int, layers: int, heads: int, *, mlp: int, context: int, eps: float) -> dict:
    return {
        "embedding_length": width,
        "block_count": layers,
        "attention.head_count": heads,
        "feed_forward_length": mlp,
        "context_length": context,
        "attention.layer_norm_epsilon": eps,
    }


def gpt_neox(hf):
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    rope = hf["rope_parameters"]
    metadata = sizes(
        width,
        hf["num_hidden_layers"],
        heads,
        mlp=hf["intermediate_size"],
        context=hf["max_position_embeddings"],
        eps=hf["layer_norm_eps"],
    ) | {
        "rope.dimension_count": int(width // heads * rope["partial_rotary_factor"]),
        "use_parallel_residual": hf["use_parallel_residual"],
        "rope.freq_base": rope["rope_theta"],  # which the converter leaves out: it is 10,000
    }
    return "gptneox", heads, metadata


def falcon(hf):
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads = hf["num_kv_heads"] if hf["new_decoder_architecture"] else 1
    # The converter takes 4 widths for the MLP, 2,048 tokens of context, and the usual base.
    metadata = sizes(
        width,
        hf["num_hidden_layers"],
        heads,
        mlp=hf["ffn_hidden_size"],
        context=hf["max_position_embeddings"],
        eps=hf["layer_norm_epsilon"],
    ) | {
        "attention.head_count_kv": kv_heads,
        "rope.freq_base": hf["rope_parameters"]["rope_theta"],
    }
    return "falcon", kv_heads, metadata


def mpt(hf):
    # The converter takes 1e-5 for the epsilon, and has no place for a scale of the scores.
    attention = hf["attn_config"]
    metadata = sizes(
        hf["d_model"],
        hf["n_layers"],
        hf["n_heads"],
        mlp=4 * hf["d_model"],
        context=hf["max_seq_len"],
        eps=hf["layer_norm_epsilon"],
    ) | {"attention.max_alibi_bias": float(attention["alibi_bias_max"])}
    if attention["clip_qkv"] is not None:
        metadata["attention.clamp_kqv"] = float(attention["clip_qkv"])
    return "mpt", hf["n_heads"], metadata


def bloom(hf):
    metadata = sizes(
        hf["hidden_size"],
        hf["n_layer"],
        hf["n_head"],
        mlp=4 * hf["hidden_size"],
        context=2048,
        eps=hf["layer_norm_epsilon"],
    ) | {"attention.head_count_kv": hf["n_head"]}
    return "bloom", hf["n_head"], metadata


CASES = [
    ("pythia", gpt_neox, "query_key_value", {}),
    # GGUF does not say which GELU: one without tanh is taken.
    ("gpt_neox_sequential", gpt_neox, "query_key_value", {"activation": "gelu"}),
    # Its files hold the tied head, too; in GGUF that cannot be told from one of its own.
    ("falcon_7b", falcon, "query_key_value", {"tied_embeddings": False}),
    ("falcon_40b", falcon, "query_key_value", {}),
    ("falcon_11b", falcon, "query_key_value", {}),
    ("mpt", mpt, "(none)", {}),
    ("mpt_storywriter", mpt, "(none)", {"attention_scale": None}),
    ("bloom", bloom, "query_key_value", {}),
]


@pytest.mark.parametrize(("name", "converted", "fused", "lost"), CASES, ids=[c[0] for c in CASES])
def test_same_model_as_safetensors(tmp_path, name, converted, fused, lost):
    hf = json.loads((DATA / name / "config.json").read_text())
    architecture, kv_heads, metadata = converted(hf)
    path = tmp_path / "model.gguf"
    write(path, DATA / name, architecture, kv_heads, fused, metadata)
    model = open_checkpoint(str(path)).model
    expected = open_checkpoint(str(DATA / name)).model
    eps = float(np.float32(expected.config.norm_eps))  # as metadata is
    assert model.config == dataclasses.replace(expected.config, norm_eps=eps, **lost)
    ours, theirs = model.weights(), expected.weights()
    theirs.setdefault("head", theirs["embed"])
    assert ours.keys() | {"head"} == theirs.keys()
    for weight in ours:
        np.testing.assert_array_equal(ours[weight], theirs[weight], err_msg=weight)
