"""Compiles kernels and whole steps for chips that are not here, and says what they need.

    python scripts/aot_report.py --out docs/aot.md [--targets v5e,h200] [--models llama-3-8b]

Needs no accelerator and no weights: shapes go in, the compiler's own account comes out. A program
that does not compile is a row with the compiler's first line in it.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from pallas_kernels import targets
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.ring import bytes_of, empty_ring
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sink_attention import sink_attention
from sinkjax.caches import SinkRing
from sinkjax.files import replaced
from sinkjax.models import Config, Decoder, parameters
from sinkjax.models.families import PRESETS
from sinkjax.streaming import LanguageModel, Sampling

FLAGS = flags.FLAGS
CHUNK = 512
# XLA counts a weight that it fetches into VMEM ahead of its use three times. With this, it leaves
# no room there, and "bytes accessed" is what moves between the chip and its memory.
OPTIONS = {"tpu": {"xla_tpu_scoped_vmem_limit_kib": "100000"}}


def define_flags() -> None:
    flags.DEFINE_list("targets", list(targets.NAMES), "Chips to compile for.")
    flags.DEFINE_list(
        "models", ["llama-2-7b", "llama-3-8b", "smollm2-135m"], "Presets whose steps to compile."
    )
    flags.DEFINE_list("kv_dtypes", ["bfloat16", "int8", "int4"], "Of the caches in decode.")
    flags.DEFINE_integer("layers", 0, "Compile so many layers of each model; 0: all.", 0)
    flags.DEFINE_string("out", None, "The Markdown file to write; without one, it is printed.")


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
        name: of the row.
        lower: from the target's name to what `jax.jit(...).lower` gives.
        fewest: bytes that it can't do without; None: not said.
    """

    name: str
    lower: Callable[[str], jax.stages.Lowered]
    fewest: int | None = None


def at(target: str, tree):
    """The shapes of a tree, on the target."""
    sharding = targets.sharding(target)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def weights_at(target: str, model: Decoder) -> Decoder:
    """The shapes of a model on the target, as `parameters.Parameter.placed` puts them there."""
    sharding = targets.sharding(target)

    def where(x):
        format = parameters.row_major(sharding, len(x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=format)

    return jax.tree.map(where, model)


def backend(target: str) -> str:
    return "gpu" if target == "h200" else "tpu"


def kernels() -> Iterator[Program]:
    """Each op at the shapes of a layer of Llama-3-8B."""
    B, H, Hkv, D, S, W = 8, 32, 8, 128, 4, 4092

    def tokens(B, T, heads):
        return jax.ShapeDtypeStruct((B, T, heads, D), jnp.bfloat16)

    for kv_dtype in ("bfloat16", "int8", "int4"):

        def decode(target, kv_dtype=kv_dtype):
            args = (tokens(B, 1, H), tokens(B, 1, Hkv), tokens(B, 1, Hkv), tokens(B, 1, H))
            ring = functools.partial(empty_ring, B, Hkv, S + W, D, kv_dtype)

            def f(ring, ticks, q, k, v, q_sinks):
                return ring_decode(
                    q,
                    k,
                    v,
                    ring,
                    ticks,
                    sinks=S,
                    window=W,
                    q_sinks=q_sinks,
                    backend=backend(target),
                )

            shapes = (jax.eval_shape(ring), jax.ShapeDtypeStruct((B,), jnp.int32), *args)
            return jax.jit(f, donate_argnums=0).lower(*at(target, shapes))

        fewest = bytes_of(jax.eval_shape(functools.partial(empty_ring, B, Hkv, S + W, D, kv_dtype)))
        yield Program(f"ring_decode, {kv_dtype}", decode, fewest)

    def attention(target, T=32_768, grad=False):
        def f(q, k, v, q_sinks):
            return sink_attention(
                q, k, v, sinks=S, window=W, q_sinks=q_sinks, backend=backend(target)
            )

        def loss(*args):
            return f(*args).astype(jnp.float32).sum()

        args = (tokens(1, T, H), tokens(1, T, Hkv), tokens(1, T, Hkv), tokens(1, T, H))
        return jax.jit(jax.grad(loss, (0, 1, 2, 3)) if grad else f).lower(*at(target, args))

    yield Program("sink_attention, 32k", attention)
    yield Program("sink_attention, 32k, gradient", functools.partial(attention, grad=True))

    def sparse(target, grad=False):
        T, block, N = 32_768, 128, 32

        def f(q, k, v, blocks):
            return block_sparse_attention(
                q, k, v, blocks, block_sizes=(block, block), backend=backend(target)
            )

        def loss(*args):
            return f(*args).astype(jnp.float32).sum()

        blocks = jax.ShapeDtypeStruct((1, H, T // block, N), jnp.int32)
        args = (tokens(1, T, H), tokens(1, T, Hkv), tokens(1, T, Hkv), blocks)
        return jax.jit(jax.grad(loss, (0, 1, 2)) if grad else f).lower(*at(target, args))

    yield Program("block_sparse, 32k, 32 blocks of 128", sparse)
    yield Program("block_sparse, gradient", functools.partial(sparse, grad=True))


def cache_bytes(config: Config, policy: SinkRing, batch: int) -> int:
    """Of the keys, values and scales of all layers."""
    heads = dict(kv_heads=config.kv_heads, head_dim=config.head_dim)
    cache = jax.eval_shape(lambda: policy.init(batch=batch, **heads, dtype=jnp.bfloat16))
    return config.layers * bytes_of((cache.ring, cache.recent))


def steps(name: str, config: Config, kv_dtypes: Sequence[str]) -> Iterator[Program]:
    """The decode step, with each kind of cache, and a prefill chunk of a model."""
    B, C = 8, 4096

    def lm(target) -> LanguageModel:
        model = nnx.eval_shape(lambda: Decoder(config, rngs=None, dtype=jnp.bfloat16))
        return LanguageModel(weights_at(target, model), attention_backend=backend(target))

    for kv_dtype in kv_dtypes:
        policy = SinkRing(4, C - 4, kv_dtype=kv_dtype)

        def decode(target, policy=policy):
            model = lm(target)
            state = at(target, jax.eval_shape(lambda: model.init_state(policy, seeds=range(B))))
            limit = at(target, jax.ShapeDtypeStruct((), jnp.int32))
            return model.decode.lower(state, limit, steps=1, sampling=Sampling(), stop_tokens=())

        weights = 2 * sum(
            math.prod(w.shape)
            for part, w in Decoder.shapes(config).items()
            if part != "embed" or config.tied_embeddings
        )
        yield Program(
            f"{name}: decode, {kv_dtype} KV", decode, weights + cache_bytes(config, policy, B)
        )

    def prefill(target):
        model = lm(target)
        policy = SinkRing(4, C - 4)
        state = at(target, jax.eval_shape(lambda: model.init_state(policy, seeds=(0,))))
        tokens = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        return model.prefill.lower(state, *at(target, (tokens, lengths)))

    yield Program(f"{name}: prefill of {CHUNK}", prefill)


def row(program: Program, target: str) -> list[str]:
    begin = time.perf_counter()
    try:
        compiled = program.lower(target).compile(OPTIONS.get(backend(target)))
    except Exception as error:  # whatever the compiler says is what the row is for
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return [program.name, f"**{lines[0][:160]}**".replace("|", "/"), *[""] * 6]
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    moved = cost.get("bytes accessed")
    ratio = f"{moved / program.fewest:.3f}" if moved and program.fewest else ""
    return [
        program.name,
        f"compiled, {time.perf_counter() - begin:.0f} s",
        *(
            f"{size / 1e6:,.1f}"
            for size in (
                memory.argument_size_in_bytes,
                memory.temp_size_in_bytes,
                memory.alias_size_in_bytes,
            )
        ),
        f"{moved / 1e6:,.0f}" if moved else "",
        ratio,
        f"{cost['flops'] / 1e9:,.1f}" if cost.get("flops") else "",
    ]


HEAD = ["program", "", "arguments, MB", "temporary, MB", "aliased, MB", "moved, MB"]
HEAD += ["moved / fewest", "GFLOP"]


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise app.UsageError(f"no arguments but flags are expected, got {argv[1:]}")
    programs = list(kernels())
    for name in FLAGS.models:
        config = PRESETS[name]
        if FLAGS.layers:
            config = dataclasses.replace(config, layers=FLAGS.layers)
        programs += steps(name, config, FLAGS.kv_dtypes)
    out = [
        "# Compiled ahead of time",
        "",
        f"By `scripts/aot_report.py`, jax {jax.__version__}. Ring of 4 + 4,092 slots; decode with "
        "a batch of 8, prefill of one row; bfloat16 weights"
        + (f"; {FLAGS.layers} layers of each model" if FLAGS.layers else "")
        + ". A program that needs more memory than the chip has is refused by the compiler: that "
        "model takes several chips. What XLA says of bytes and operations covers TPUs alone. On "
        "tpu7x XLA copies bfloat16 weights to another tiling at each call, and on all TPUs the "
        "tied embedding of SmolLM2: those ratios are not what a kernel costs.",
        "",
    ]
    for target in FLAGS.targets:
        out += [f"## {target}", "", f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
        for program in programs:
            out.append(f"| {' | '.join(row(program, target))} |")
            print(out[-1], flush=True)
        out.append("")
    if FLAGS.out:
        with replaced(FLAGS.out) as part:
            part.write_text("\n".join(out), encoding="utf-8")


if __name__ == "__main__":
    define_flags()
    app.run(main)
