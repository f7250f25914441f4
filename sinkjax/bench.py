"""How fast, and does it stay so: `python -m sinkjax.bench speed|recompute|forever`.

speed:      tokens per second of decode (with a cache that is full) and of prefill; with --at, of
            decode alone, far into a stream, without reading up to there.
recompute:  a token by streaming against a token by encoding its window from scratch, which is
            what a window without sinks needs to stay sane (StreamingLLM, figure 10).
forever:    one long stream: latency and resident memory from its beginning to its end.

`--model random` is a very small model.

Each prints a table to standard error and one JSON object (speed: one for each cache) to standard
output.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from tqdm import tqdm

from sinkjax.caches import FullCache, Policy, SinkRing
from sinkjax.cli import cache_policies, define_cache_flag, define_model_flags, load_model, run
from sinkjax.mesh import is_main, make
from sinkjax.models import Config, Decoder
from sinkjax.streaming import LanguageModel, Sampling, Stream

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_model_flags()
    define_cache_flag(
        None,
        "Of speed alone; by default, ring:4+1020. A full cache without a size has room for what is "
        "read and written.",
    )
    flags.DEFINE_integer("sinks", 4, "recompute, forever: first tokens that are kept for ever.")
    flags.DEFINE_list("caches", ["1024"], "recompute, forever: cache sizes (sinks + window).")
    flags.DEFINE_integer("tokens", 128, "Tokens to decode.")
    flags.DEFINE_integer("prefill", 1024, "speed: tokens of the prompt.")
    flags.DEFINE_integer(
        "at",
        None,
        "speed: decode the last --tokens before a stream has so many, as if it had read the others "
        "(times depend on sizes alone); no prefill.",
    )
    flags.DEFINE_integer("chunk", 512, "Tokens that one prefill call takes.")
    flags.DEFINE_integer("steps_per_call", 1, "Tokens per call of the compiled step.")


def load() -> LanguageModel:
    if FLAGS.model != "random":
        return load_model()
    config = Config(
        family="llama",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
        rope_base=10_000.0,
        trained_context=2048,
    )
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(FLAGS.dtype))
    devices = None if FLAGS.mesh is None else make(FLAGS.mesh)
    if devices is not None or FLAGS.weight_dtype is not None:
        model = Decoder.from_weights(
            config, model.weights(), model.dtype, devices, FLAGS.weight_dtype
        )
    return LanguageModel(
        model, name="random", attention_backend=FLAGS.attention_backend, mesh=devices
    )


def some_tokens(lm: LanguageModel, count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, count).tolist()


def new_stream(lm: LanguageModel, cache: Policy, steps_per_call: int) -> Stream:
    return Stream(
        lm,
        cache=cache,
        sampling=Sampling(),
        ignore_eos=True,
        steps_per_call=steps_per_call,
        chunk=FLAGS.chunk,
    )


def full_stream(lm: LanguageModel, cache: Policy, steps_per_call: int) -> Stream:
    """A stream whose rings have no free slot; a full cache has some for the tokens to decode."""
    fed = cache.capacity + 8
    if cache.limit is not None:
        fed = cache.limit - FLAGS.tokens - 2 * steps_per_call
        if fed < 1:
            raise ValueError(
                f"a cache of {cache.limit} tokens has no room for the {FLAGS.tokens} to decode: "
                "give --cache more, or less --tokens"
            )
    stream = new_stream(lm, cache, steps_per_call)
    stream.feed([some_tokens(lm, fed)])
    return stream


def as_if_read(stream: Stream, tokens: int) -> None:
    """Sets the clocks of a fresh stream as if each row had read so many tokens. Their keys and
    values stay zeros."""
    caches = stream.state.caches
    parts = [
        part
        for cache in caches.layers
        for part in [getattr(cache, name) for name in getattr(cache, "parts", ())] or [cache]
    ]
    policies = dict.fromkeys(part.policy for part in parts)  # in the order of their clocks
    clocks = tuple(
        dataclasses.replace(
            clock,
            ticks=clock.ticks + (policy.folded(tokens) if isinstance(policy, SinkRing) else tokens),
            position=clock.position + np.uint32(tokens % 2**32),
        )
        for policy, clock in zip(policies, caches.clocks, strict=True)
    )
    caches = dataclasses.replace(caches, clocks=clocks)
    stream.state = dataclasses.replace(stream.state, caches=caches)
    for row in stream.rows:
        row.fed = tokens


def decode_seconds(stream: Stream, tokens: int) -> list[float]:
    """Seconds a token, of each call of the step."""
    seconds, last = [], None
    for outputs in stream.run(tokens + 2 * stream.steps_per_call):
        now = time.perf_counter()
        if last is not None:
            seconds.append((now - last) / len(outputs[0].tokens))
        last = now
    return seconds[1:]


def times(f: Callable[[], Any], repeats: int) -> list[float]:
    f()
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        out.append(time.perf_counter() - start)
    return out


def speed() -> Iterator[dict]:
    at, drawn = FLAGS.at, FLAGS.tokens + 2 * FLAGS.steps_per_call
    if at is not None and at <= drawn:
        raise ValueError(
            f"--at must be more than the {drawn} tokens to decode, got {at}: give it more, or less "
            "--tokens"
        )
    specs = FLAGS.cache or ["ring:4+1020"]
    policies = cache_policies(specs, tokens=at or FLAGS.prefill + FLAGS.tokens)
    for policy in policies.values():
        policy.check(at or FLAGS.prefill)
    lm = load()
    for spec, policy in policies.items():
        if at is None:
            found = speed_from_start(lm, policy)
        else:
            found = {"at": at, **speed_as_if_read(lm, policy, at - drawn)}
        same = dict(cache_bytes=lm.cache_bytes(policy), steps_per_call=FLAGS.steps_per_call)
        yield {"cache": spec, **same, **found}


def speed_as_if_read(lm: LanguageModel, policy: Policy, tokens: int) -> dict:
    """Of decode after so many tokens."""
    stream = new_stream(lm, policy, FLAGS.steps_per_call)
    as_if_read(stream, tokens)
    return decode_figures(stream)


def decode_figures(stream: Stream) -> dict:
    seconds = statistics.median(decode_seconds(stream, FLAGS.tokens))
    return {"decode_ms_per_token": 1e3 * seconds, "decode_tokens_per_s": 1 / seconds}


def speed_from_start(lm: LanguageModel, policy: Policy) -> dict:
    """Of decode and prefill."""
    stream = full_stream(lm, policy, FLAGS.steps_per_call)
    decoded = decode_figures(stream)
    prompt = some_tokens(lm, FLAGS.prefill)

    def prefill():
        stream.reset()
        stream.feed([prompt])
        jax.block_until_ready(stream.state.hidden)

    prefill_seconds = statistics.median(times(prefill, 3))
    rate = FLAGS.prefill / prefill_seconds
    return {**decoded, "prefill_tokens_per_s": rate, "chunk": FLAGS.chunk}


def recompute() -> list[dict]:
    lm = load()
    rows = []
    for size in map(int, FLAGS.caches):
        stream = full_stream(lm, SinkRing(FLAGS.sinks, size - FLAGS.sinks), FLAGS.steps_per_call)
        streaming = statistics.median(decode_seconds(stream, FLAGS.tokens))
        window = np.asarray([some_tokens(lm, size)], np.int32)
        lengths = np.asarray([size], np.int32)
        dense = FullCache(size)

        def from_scratch(window=window, lengths=lengths, dense=dense):
            lm.prefill(lm.init_state(dense), window, lengths).hidden.block_until_ready()

        recomputed = statistics.median(times(from_scratch, 3))
        rows.append(
            {
                "cache": size,
                "streaming_ms": 1e3 * streaming,
                "recompute_ms": 1e3 * recomputed,
                "ratio": recomputed / streaming,
            }
        )
        if is_main():
            print(
                "cache {cache}: streaming {streaming_ms:.1f} ms a token, re-computation "
                "{recompute_ms:.1f} ms, ratio {ratio:.1f}".format(**rows[-1]),
                file=sys.stderr,
            )
    return [{"rows": rows}]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forever() -> list[dict]:
    lm = load()
    size = int(FLAGS.caches[0])
    stream = full_stream(lm, SinkRing(FLAGS.sinks, size - FLAGS.sinks), FLAGS.steps_per_call)
    seconds: list[float] = []
    memory: list[tuple[int, int]] = []
    last, count = None, 0
    quiet = not is_main()
    with tqdm(total=FLAGS.tokens, unit="token", file=sys.stderr, disable=quiet) as bar:
        for outputs in stream.run(FLAGS.tokens):
            n = len(outputs[0].tokens)
            now = time.perf_counter()
            if last is not None:
                seconds.append((now - last) / n)
            last = now
            if count // 1000 != (count + n) // 1000:
                memory.append((count + n, resident_bytes()))
            count += n
            bar.update(n)
    # The first calls warm up; then the beginning and the end, each a tenth of the stream.
    seconds = seconds[max(1, len(seconds) // 100) :]
    tenth = max(1, len(seconds) // 10)
    after_first = [b for n, b in memory if n >= 1000]
    first, last_tenth = statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])
    found = {
        "cache": size,
        "tokens": count,
        "traces_of_the_step": lm.decode.traces,
        "ms_per_token_first_tenth": 1e3 * first,
        "ms_per_token_last_tenth": 1e3 * last_tenth,
        "latency_ratio": last_tenth / first,
        "resident_mb_after_1000": after_first[0] / 1e6,
        "resident_mb_at_the_end": after_first[-1] / 1e6,
        "resident_mb_most": max(after_first) / 1e6,
    }
    return [found]


KINDS: dict[str, Callable[[], Iterable[dict]]] = {
    "speed": speed,
    "recompute": recompute,
    "forever": forever,
}


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in KINDS:
        given = " ".join(arguments) or "none"
        raise app.UsageError(f"give one of {', '.join(KINDS)}, got {given}")
    kind = arguments[0]
    for name in ("sinks", "caches") if kind == "speed" else ("cache", "at", "prefill"):
        if FLAGS[name].present:
            others = "recompute and forever" if kind == "speed" else "speed"
            raise app.UsageError(f"--{name} belongs to {others}, not to {kind}")
    if FLAGS.at is not None and FLAGS["prefill"].present:
        raise app.UsageError("--at measures decode alone: leave out --prefill")
    if any(not size.isdigit() or int(size) <= FLAGS.sinks for size in FLAGS.caches):
        raise ValueError(f"--caches must be whole numbers above --sinks, got {FLAGS.caches}")
    if kind == "forever" and FLAGS.tokens < 2000:
        raise ValueError(f"forever needs --tokens ≥ 2000 to say anything, got {FLAGS.tokens}")
    for found in KINDS[kind]():
        result = {
            "bench": kind,
            "model": FLAGS.model,
            "dtype": FLAGS.dtype,
            "weight_dtype": FLAGS.weight_dtype,
            **found,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        }
        if is_main():
            for name, value in result.items():
                if isinstance(value, float) or name == "cache":
                    text = f"{value:.4g}" if isinstance(value, float) else value
                    print(f"{name:>28}  {text}", file=sys.stderr)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    define_flags()
    run(main)
