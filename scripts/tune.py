"""Finds the fastest block sizes of the attention ops on the device at hand, and writes their table.

    python scripts/tune.py [--ops flash,ring_decode] [--head_dims 64,128] [--dtypes bfloat16]

The table goes to `pallas_kernels/tuning/<device>/<op>.json`, where the ops look for it. What other
head dimensions and dtypes have there stays. On a CPU it is the form in blocks that is tuned.
"""

import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from pallas_kernels import tuning
from pallas_kernels.ring import empty_ring
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sink_attention import sink_attention
from sinkjax.files import replaced

FLAGS = flags.FLAGS
SINKS = 4


def define_flags() -> None:
    flags.DEFINE_list("ops", ["flash"], "flash (sink and block-sparse attention), ring_decode.")
    flags.DEFINE_list("head_dims", ["64", "128"], "Head dimensions.")
    flags.DEFINE_list("dtypes", ["float32"], "Of queries and keys; of the ring.")
    flags.DEFINE_list("blocks", ["128", "256", "512"], "Sizes to try.")
    flags.DEFINE_integer("tokens", 2048, "Of the prompt.", 16)
    flags.DEFINE_integer("slots", 1024, "Of the ring, and of sinks and window.", 16)
    flags.DEFINE_integer("batch", 1, "Rows in decode.", 1)
    flags.DEFINE_integer("heads", 8, "Query heads; a quarter as many KV heads.", 4)
    flags.DEFINE_integer("repeats", 5, "Timings, of which the median counts.", 1)
    flags.DEFINE_string("out", None, "Another folder than the one where the ops look.")


def backend() -> str:
    here = jax.default_backend()
    return "xla" if here == "cpu" else here


def flash(head_dim: int, dtype: str, sizes: tuple[int, ...]) -> Callable[[], Any]:
    """A prompt, forward and backward."""
    T, H = FLAGS.tokens, FLAGS.heads
    q = jnp.ones((1, T, H, head_dim), dtype)
    k = jnp.ones((1, T, H // 4, head_dim), dtype)

    @jax.jit
    def run(q, k):
        def loss(q, k):
            rule = dict(sinks=SINKS, window=FLAGS.slots - SINKS)
            out = sink_attention(q, k, k, backend=backend(), block_sizes=sizes, **rule)
            return out.astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1))(q, k)

    return functools.partial(run, q, k)


def decode(head_dim: int, dtype: str, sizes: tuple[int, ...]) -> Callable[[], Any]:
    """A step over a full ring."""
    B, H, C = FLAGS.batch, FLAGS.heads, FLAGS.slots
    floats = dtype if jnp.issubdtype(jnp.dtype(dtype), jnp.floating) else "bfloat16"
    q, k = jnp.ones((B, 1, H, head_dim), floats), jnp.ones((B, 1, H // 4, head_dim), floats)
    ring = empty_ring(B, H // 4, C, head_dim, dtype)
    ticks = jnp.full(B, C, jnp.int32)
    rule = dict(sinks=SINKS, window=C - SINKS, block_size=sizes[0], backend=backend())
    return functools.partial(jax.jit(functools.partial(ring_decode, **rule)), q, k, k, ring, ticks)


OPS = {"flash": (flash, 2), "ring_decode": (decode, 1)}


def median_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def fastest(op: str, head_dim: int, dtype: str) -> list[int]:
    make, dimensions = OPS[op]
    measured = {}
    for sizes in itertools.product(map(int, FLAGS.blocks), repeat=dimensions):
        try:
            measured[sizes] = median_seconds(make(head_dim, dtype, sizes))
        except ValueError as error:  # a size that the kernel refuses is no candidate
            print(f"{op} {head_dim} {dtype} {sizes}: {error}")
            continue
        print(f"{op} {head_dim} {dtype} {sizes}: {1e3 * measured[sizes]:.3f} ms", flush=True)
    if not measured:
        raise ValueError(f"{op}: no block size of {FLAGS.blocks} serves {head_dim} {dtype}")
    return list(min(measured, key=measured.__getitem__))


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise app.UsageError(f"no arguments but flags are expected, got {argv[1:]}")
    unknown = [op for op in FLAGS.ops if op not in OPS]
    if unknown or (backend() == "xla" and "ring_decode" in FLAGS.ops):
        raise app.UsageError(f"--ops {FLAGS.ops}: expected flash, or ring_decode on a TPU or GPU")
    for op in FLAGS.ops:
        path = tuning.folder() / f"{op}.json" if FLAGS.out is None else None
        path = path or os.path.join(FLAGS.out, f"{op}.json")
        table = json.load(open(path)) if os.path.exists(path) else {}
        for head_dim, dtype in itertools.product(map(int, FLAGS.head_dims), FLAGS.dtypes):
            table[tuning.key(head_dim, dtype)] = fastest(op, head_dim, dtype)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replaced(path) as part:
            part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
