"""Compiles the steps of large models for TPU slices that are not here: do they fit, and what do
their chips say to each other?

    python scripts/scale_report.py --out scale.txt [--models llama-3-8b] [--layers 2]

Needs no accelerator and no weights, as `aot_report.py`.
"""

import collections
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.ring import Ring
from sinkjax.caches import SinkRing
from sinkjax.files import replaced
from sinkjax.mesh import DATA, MODEL, over, parse, spec_of
from sinkjax.models import Config, Decoder, parameters
from sinkjax.models.families import PRESETS
from sinkjax.streaming import LanguageModel, Sampling
from sinkjax.streaming.step import CHUNK, StreamState, specs_of

FLAGS = flags.FLAGS
SINKS = 4
# What the compiler grants a program (its own words, where one asks for too much), GiB.
MEMORY = {"v5e-4": 15.75, "v6e-4": 31.24, "v5p-8": 95.73, "v6e-16": 31.24}
GIB = 1 << 30


class Case(NamedTuple):
    """A model on a slice."""

    model: str
    target: str
    mesh: str


CASES = (
    Case("llama-3-8b", "v5e-4", "model=4"),
    Case("llama-3-8b", "v6e-4", "model=4"),
    Case("gpt-oss-20b", "v6e-4", "model=4"),
    Case("llama-2-70b", "v5p-8", "model=4"),
    Case("llama-2-70b", "v6e-16", "model=8,data=2"),
    Case("llama-2-70b", "v6e-16", "model=16"),
)


def define_flags() -> None:
    flags.DEFINE_list("models", sorted({case.model for case in CASES}), "Models to compile.")
    flags.DEFINE_list("targets", list(targets.SLICES), "Slices to compile for.")
    flags.DEFINE_list("kv_dtypes", ["bfloat16", "int8"], "Of the caches in decode.")
    flags.DEFINE_bool("prefill", True, "Compile the prefill of a chunk too.")
    flags.DEFINE_integer("layers", 0, "Compile so many layers of each model; 0: all.", 0)
    flags.DEFINE_integer("batch", 32, "Rows.", 1)
    flags.DEFINE_integer("ring", 4096, "Slots of a ring, the sinks among them.", SINKS + 1)
    flags.DEFINE_string("out", None, "The Markdown file to write; without one, it is printed.")


def with_layers(config: Config, layers: int) -> Config:
    """The first layers of a model."""
    local = config.local_layers
    return dataclasses.replace(
        config, layers=layers, local_layers=None if local is None else local[:layers]
    )


def on(mesh: Mesh, shape: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))


def row_major(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """As `parameters.Parameter.placed` puts a weight on its device."""
    format = parameters.row_major(x.sharding, len(x.shape))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=format)


def model_on(config: Config, mesh: Mesh) -> LanguageModel:
    """A model of shapes alone, bfloat16."""
    shards = mesh.shape[MODEL]
    model = nnx.eval_shape(lambda: Decoder(config, rngs=None, dtype=jnp.bfloat16, shards=shards))
    graph, state = nnx.split(model)
    placed = jax.tree.map(
        lambda v: v.replace(row_major(on(mesh, v.get_value(), spec_of(v.axes)))),
        state,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return LanguageModel(nnx.merge(graph, placed), attention_backend="tpu", mesh=mesh)


def state_on(lm: LanguageModel, policy: SinkRing, batch: int) -> StreamState:
    state = jax.eval_shape(lambda: lm.init_state(policy, seeds=range(batch)))
    return jax.tree.map(lambda x, spec: on(lm.mesh, x, spec), state, specs_of(state, DATA))


def decode(lm: LanguageModel, state: StreamState) -> jax.stages.Lowered:
    limit = on(lm.mesh, jax.ShapeDtypeStruct((), jnp.int32), P())
    return lm.decode.lower(state, limit, steps=1, sampling=Sampling(), stop_tokens=())


def prefill(lm: LanguageModel, state: StreamState) -> jax.stages.Lowered:
    batch = len(state.seeds)
    tokens, lengths = (
        on(lm.mesh, jax.ShapeDtypeStruct(shape, jnp.int32), P(DATA))
        for shape in ((batch, CHUNK), (batch,))
    )
    return lm.prefill.lower(state, tokens, lengths)


def share_bytes(tree: Any) -> int:
    """What one device holds of arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def rings(state: StreamState) -> list[Ring]:
    leaves = jax.tree.leaves(state.caches, is_leaf=lambda x: isinstance(x, Ring))
    return [x for x in leaves if isinstance(x, Ring)]


_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS}|ragged-all-to-all)(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+)\[([0-9,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> collections.Counter[tuple[str, str, int]]:
    """How often each kind of talk between devices stands in a program: kind, dtype, numbers in
    the (largest) result. The body of decode's loop is one step."""
    found: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for line in compiled.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            arrays = [
                (math.prod(int(n) for n in dims.split(",") if n), dtype)
                for dtype, dims in _ARRAY.findall(match[1])
            ]
            size, dtype = max(arrays)
            found[match[2], dtype, size] += 1
    return found


def written(
    config: Config, mesh: Mesh, batch: int, tokens: int, *, logits: bool
) -> collections.Counter[tuple[str, str, int]]:
    """The collectives that the model's code asks for: activations are added up after the
    embedding, after attention and after the MLP (after both at once, where they are parallel),
    logits are gathered, and groups of rows tell each other whether they go on."""
    rows = batch // mesh.shape[DATA]
    vocab_is_spread = config.vocab_size % mesh.shape[MODEL] == 0
    sums = vocab_is_spread + config.layers * (1 if config.parallel else 2)
    expected = {("all-reduce", "bf16", rows * tokens * config.hidden_size): sums}
    if logits and vocab_is_spread:
        expected["all-gather", "f32", rows * config.vocab_size] = 1
    if logits and mesh.shape[DATA] > 1:  # whether any row goes on: before the loop, and in it
        expected["all-reduce", "s32", 1] = 2
    return collections.Counter(expected)


class Account(NamedTuple):
    """What the compiler says of a program, for one device, in bytes."""

    arguments: int
    aliased: int
    temporary: int
    total: int
    moved: float
    seconds: float
    collectives: collections.Counter[tuple[str, str, int]]


def total(compiled: jax.stages.Compiled) -> int:
    """What a program holds on a device while it runs."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )


def account(lowered: jax.stages.Lowered) -> Account:
    begin = time.perf_counter()
    compiled = lowered.compile()
    m = compiled.memory_analysis()
    return Account(
        m.argument_size_in_bytes,
        m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        total(compiled),
        (compiled.cost_analysis() or {}).get("bytes accessed", math.nan),
        time.perf_counter() - begin,
        collectives(compiled),
    )


def said(found: collections.Counter[tuple[str, str, int]]) -> str:
    return ", ".join(f"{n} {kind} of {size:,} {dtype}" for (kind, dtype, size), n in found.items())


def rows(case: Case, config: Config) -> Iterator[list[str]]:
    """Of the table: the steps of a model on a slice."""
    mesh = over(targets.devices(case.target), parse(case.mesh))
    lm = model_on(config, mesh)
    programs = [(f"decode, {kv} KV", decode, kv) for kv in FLAGS.kv_dtypes]
    if FLAGS.prefill:
        programs.append((f"prefill of {CHUNK}", prefill, "bfloat16"))
    for name, lower, kv_dtype in programs:
        policy = SinkRing(SINKS, FLAGS.ring - SINKS, kv_dtype=kv_dtype)
        state = state_on(lm, policy, FLAGS.batch)
        start = [case.model, case.target, case.mesh, name]
        try:
            lowered = lower(lm, state)
            a = account(lowered)
        except Exception as error:  # whatever the compiler says is what the row is for
            lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            yield [*start, f"**{lines[0][:200]}**".replace("|", "/")]
            continue
        tokens = 1 if lower is decode else CHUNK
        expected = written(config, mesh, FLAGS.batch, tokens, logits=lower is decode)
        held = share_bytes(rings(state))
        # Prefill needs no logits, and so does not count the head, which is there all the same.
        head = 0 if lower is decode or config.tied_embeddings else share_bytes(lm.model.head)
        total, limit = a.total + head, MEMORY[case.target] * GIB
        yield [
            *start,
            f"{(a.arguments + head - held) / GIB:.2f}",
            f"{held / GIB:.2f}",
            f"{a.temporary / GIB:.2f}",
            f"{total / GIB:.2f}",
            f"{(limit - total) / GIB:.2f}" if total <= limit else "**does not fit**",
            "yes" if a.aliased >= held else f"**{a.aliased / GIB:.2f}**",
            said(a.collectives) + ("" if a.collectives == expected else f" **≠ {said(expected)}**"),
            f"{a.seconds:.0f} s",
        ]


HEAD = ["model", "slice", "mesh", "program", "weights, GiB", "rings", "temporary", "in all"]
HEAD += ["free", "rings in place", "collectives", "compiled in"]


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise app.UsageError(f"no arguments but flags are expected, got {argv[1:]}")
    out = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    print("\n".join(out))
    for case in CASES:
        if case.model not in FLAGS.models or case.target not in FLAGS.targets:
            continue
        config = PRESETS[case.model]
        for row in rows(case, with_layers(config, FLAGS.layers or config.layers)):
            out.append(f"| {' | '.join(row)} |")
            print(out[-1], flush=True)
    if FLAGS.out:
        with replaced(FLAGS.out) as part:
            part.write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    define_flags()
    app.run(main)
