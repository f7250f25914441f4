"""GGUF files as llama.cpp's converter writes them, from the small models of the newer families."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sinkjax.checkpoints import open_checkpoint
from sinkjax.models.families import config_from_gguf

DATA = Path(__file__).parents[1] / "data" / "families"
MXFP4 = gguf.GGMLQuantizationType.MXFP4
Named = Iterator[tuple[str, np.ndarray]]  # under the names that the converter looks up


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with safe_open(folder / "model.safetensors", framework="flax") as file:
        tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
    tensors = {k: x if x.dtype == np.uint8 else x.astype(np.float32) for k, x in tensors.items()}
    return json.loads((folder / "config.json").read_text()), tensors


def sizes(hf: dict) -> dict:
    """What the converter writes for all of them."""
    metadata = {
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "feed_forward_length": hf["intermediate_size"],
        "context_length": hf["max_position_embeddings"],
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
    }
    if hf.get("head_dim"):
        metadata |= {f"attention.{x}_length": hf["head_dim"] for x in ("key", "value")}
    return metadata


def write(path: Path, architecture: str, metadata: dict, tensors: Named) -> None:
    """Names of tensors are those that llama.cpp's own table gives for theirs."""
    writer = gguf.GGUFWriter(path, architecture)
    adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        adds.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], metadata["block_count"])
    for name, x in tensors:
        found = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(found, x, raw_dtype=MXFP4 if x.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def phi3(hf, tensors):
    rope, width = hf["rope_parameters"], hf["hidden_size"]
    original, context = hf["original_max_position_embeddings"], hf["max_position_embeddings"]
    dims = int(rope["partial_rotary_factor"] * width) // hf["num_attention_heads"]
    metadata = sizes(hf) | {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": dims,
        "rope.freq_base": rope["rope_theta"],
        "attention.sliding_window": hf["sliding_window"] or 0,
    }
    named = dict(tensors)
    if rope["rope_type"] == "longrope":
        times = math.sqrt(1 + math.log(context / original) / math.log(original))
        metadata["rope.scaling.attn_factor"] = times
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], np.float32)
            named[f"rope_factors_{kind}.weight"] = factors
    return "phi3", metadata, named.items()


def plus_one(tensors) -> Named:
    return ((k, x + 1 if k.endswith("norm.weight") else x) for k, x in tensors.items())


def gemma(hf, tensors):
    return "gemma", sizes(hf), plus_one(tensors)


def gemma2(hf, tensors):
    metadata = sizes(hf) | {
        "attn_logit_softcapping": hf["attn_logit_softcapping"],
        "final_logit_softcapping": hf["final_logit_softcapping"],
        "attention.sliding_window": hf["sliding_window"],
    }
    return "gemma2", metadata, plus_one(tensors)


def gemma3(hf, tensors):
    rope = hf["rope_parameters"]["full_attention"]
    metadata = sizes(hf) | {
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": rope["rope_type"],
        "rope.scaling.factor": rope["factor"],
        "attention.sliding_window": hf["sliding_window"],
    }
    return "gemma3", metadata, plus_one(tensors)


def gemma3_with_pattern(hf, tensors):
    architecture, metadata, named = gemma3(hf, tensors)
    local = [kind == "sliding_attention" for kind in hf["layer_types"]]
    return architecture, metadata | {"attention.sliding_window_pattern": local}, named


def stacked(hf, tensors, experts: str, merged: str, parts: dict[str, str], count: int) -> Named:
    """With the experts of each layer in one tensor."""
    for name, x in tensors.items():
        if ".experts." not in name:
            yield name, x
    for layer in range(hf["num_hidden_layers"]):
        for part, other in parts.items():
            names = [f"model.layers.{layer}.{experts}.{x}.{part}.weight" for x in range(count)]
            yield f"{merged.format(layer)}.{other}.weight", np.stack([tensors[n] for n in names])


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to q and k of the architecture `llama`."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def mixtral(hf, tensors):
    count = hf["num_local_experts"]
    metadata = sizes(hf) | {
        "rope.dimension_count": hf["hidden_size"] // hf["num_attention_heads"],
        "rope.freq_base": hf["rope_parameters"]["rope_theta"],
        "expert_count": count,
        "expert_used_count": hf["num_experts_per_tok"],
    }
    heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
    permuted = {
        name: interleaved(x, heads[part]) if (part := name.split(".")[-2]) in heads else x
        for name, x in tensors.items()
    }
    same = {part: part for part in ("w1", "w2", "w3")}
    merged = "layers.{}.feed_forward.experts"
    named = stacked(hf, permuted, "block_sparse_moe.experts", merged, same, count)
    return "llama", metadata, named


def qwen3_moe(hf, tensors):
    count = hf["num_experts"]
    metadata = sizes(hf) | {
        "rope.freq_base": hf["rope_parameters"]["rope_theta"],
        "expert_count": count,
        "expert_used_count": hf["num_experts_per_tok"],
        "expert_feed_forward_length": hf["moe_intermediate_size"],
    }
    same = {f"{part}_proj": f"{part}_proj" for part in ("gate", "up", "down")}
    named = stacked(hf, tensors, "mlp.experts", "model.layers.{}.mlp.experts", same, count)
    return "qwen3moe", metadata, named


def repacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """ggml's MXFP4: the scale, then 16 bytes with numbers j and 16 + j in byte j."""
    numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    blocks = numbers[..., :16] | numbers[..., 16:] << 4
    rows = np.concatenate([scales[..., None], blocks], axis=-1)
    return rows.reshape(*scales.shape[:-1], -1)


def gpt_oss(hf, tensors):
    rope = hf["rope_parameters"]
    metadata = sizes(hf) | {
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"],
        "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        "attention.sliding_window": hf["sliding_window"],
        "expert_count": hf["num_local_experts"],
        "expert_used_count": hf["num_experts_per_tok"],
        "expert_feed_forward_length": hf["intermediate_size"],
    }

    def named() -> Named:
        for name, x in tensors.items():
            if ".experts." not in name:
                yield name + ".weight" * name.endswith("sinks"), x
                continue
            front, last = name.rsplit(".", 1)
            part, kind = last.split("_proj")
            if kind == "_scales":
                continue
            suffix = "bias" if kind == "_bias" else "weight"
            if kind == "":
                x = x.swapaxes(1, 2)
            elif kind == "_blocks":
                x = repacked(x, tensors[name.replace("_blocks", "_scales")])
            split = {"gate": x[:, ::2], "up": x[:, 1::2]} if part == "gate_up" else {part: x}
            for part, y in split.items():
                yield f"{front}.{part}_proj.{suffix}", np.ascontiguousarray(y)

    return "gpt-oss", metadata, named()


# What GGUF has no place for is as in the models that there are.
SCALE = {"attention_scale": None}
CASES = [
    ("phi3", phi3, {}),
    ("phi3_long", phi3, {}),
    ("phi3_short", phi3, {}),
    ("phi4_mini", phi3, {}),
    ("gemma", gemma, {}),
    ("gemma2", gemma2, SCALE),
    ("gemma3", gemma3, SCALE | {"local_layers": None}),  # of four layers the sixth is global
    ("gemma3", gemma3_with_pattern, SCALE),
    ("mixtral", mixtral, {"family": "llama"}),
    ("gpt_oss", gpt_oss, {"swiglu_limit": 7.0}),
    ("gpt_oss_mxfp4", gpt_oss, {"swiglu_limit": 7.0}),
]


FLOATS = {"norm_eps", "rope_base", "attention_soft_cap", "logit_soft_cap", "amplitudes"}
FLOATS |= {f"rope_scaling.{kind}_factors" for kind in ("short", "long")}


def compare(path: Path, folder: Path, lost: dict) -> None:
    """The model in a GGUF file is that in a folder, but for some values of its config: the same
    switches, and the same weights bit for bit, so the same logits."""
    model = open_checkpoint(str(path)).model
    expected = open_checkpoint(str(folder)).model

    def values(config) -> dict:
        # The formula for what is multiplied; the file has the outcome.
        held = dataclasses.asdict(config)
        held["amplitudes"] = [config.rotary(layer).amplitude for layer in range(config.layers)]
        if held["rope_scaling"] is not None:
            del held["rope_scaling"]["attention_factor"]
            held |= {f"rope_scaling.{k}": v for k, v in held.pop("rope_scaling").items()}
        return held

    ours, theirs = values(model.config), values(expected.config) | lost
    assert ours.keys() == theirs.keys()
    for field, value in theirs.items():
        if field in FLOATS and value is not None:  # metadata is float32
            value = pytest.approx(value, rel=1e-6)
        assert ours[field] == value, field
    ours, theirs = model.weights(), expected.weights()
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "converted", "lost"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES]
)
def test_same_model_as_safetensors(tmp_path, name, converted, lost):
    write(tmp_path / "model.gguf", *converted(*read(DATA / name)))
    compare(tmp_path / "model.gguf", DATA / name, lost)


def test_qwen3_moe(tmp_path):
    # llama.cpp knows it with experts in all layers alone: those that have them are taken.
    hf, tensors = read(DATA / "qwen3_moe")
    hf |= {"num_hidden_layers": 2, "mlp_only_layers": []}
    hf["num_experts"] = hf.get("num_experts") or hf["num_local_experts"]
    tensors = {
        name.replace("layers.2.", "layers.1."): x
        for name, x in tensors.items()
        if "layers.1." not in name
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "model.safetensors")
    write(tmp_path / "model.gguf", *qwen3_moe(hf, tensors))
    compare(tmp_path / "model.gguf", folder, {})


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "heads"),
    [("gemma2", 46, 4608, 32), ("gemma3", 62, 5376, 32)],
)
def test_the_largest_gemma_scales_scores_by_another_width(architecture, layers, width, heads):
    values = {
        "general.architecture": architecture,
        f"{architecture}.attention.key_length": 128,
        f"{architecture}.attention.value_length": 128,
    }
    for key, value in {
        "embedding_length": width,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": 16,
        "feed_forward_length": 4 * width,
        "context_length": 8192,
    }.items():
        values[f"{architecture}.{key}"] = value
    config = config_from_gguf(values, {"token_embd.weight": (256_000, width)})
    assert config.attention_scale == (width / heads) ** -0.5  # 144 and 168 dimensions
    if architecture == "gemma2":  # as the first files, which say nothing of these
        assert config.attention_soft_cap == 50 and config.logit_soft_cap == 30
        assert config.window(0) == 4096 and config.window(1) is None
