"""What DuoAttention saves: memory and bytes moved of whole steps, for chips that are not here.

    python scripts/duo_report.py [--tables memory,context,speed,training] [--out tables.md]

Needs no accelerator and no weights, as `aot_report.py`. The pattern has the same number of
retrieval heads in every layer.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from aot_report import at, backend, weights_at
from flax import nnx
from scale_report import GIB, MEMORY, total, with_layers

from pallas_kernels.ring import bytes_of
from sinkjax.caches import FullCache, HeadSplit, Policy, SinkRing
from sinkjax.files import replaced
from sinkjax.models import Decoder
from sinkjax.models.families import PRESETS
from sinkjax.streaming import LanguageModel, Sampling
from sinkjax.train import read_config
from sinkjax.training import GateTrainer, PasskeyRows

FLAGS = flags.FLAGS
# As in `aot_report.py`: no room to fetch a weight ahead, not even one of int8.
OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "126000"}
CHUNK = 512
SINKS, WINDOW = 64, 256
# Of the heads, as in the paper: MHA keeps a quarter, GQA a half.
RETRIEVAL = {"llama-2-7b": 0.25, "llama-3-8b": 0.5}
# The largest program: what the compiler grants one chip; of a GPU, all that it has.
LIMITS = {"v5e": MEMORY["v5e-4"] * GIB, "v6e": MEMORY["v6e-4"] * GIB, "h200": 141e9}


def define_flags() -> None:
    flags.DEFINE_list("tables", list(TABLES), "Which to make.")
    flags.DEFINE_string("out", None, "The Markdown file to write; without one, it is printed.")


def policy_of(model: str, tokens: int, kind: str, kv_dtype: str | None = None) -> Policy:
    """Full attention, or the retrieval heads full and the others a ring."""
    full = FullCache(tokens, kv_dtype=kv_dtype)
    if kind == "full":
        return full
    config = PRESETS[model]
    count = int(config.kv_heads * RETRIEVAL[model])
    heads = [head < count for head in range(config.kv_heads)]
    ring = SinkRing(SINKS, WINDOW, positions="absolute", kv_dtype=kv_dtype)
    return HeadSplit(full, ring, [heads] * config.layers)


class Step(NamedTuple):
    """What is compiled: the decode step of a model, or the prefill of a chunk of one row.

    Attributes:
        rows: of a batch.
        layers: the first so many of the model; None: all.
        weight_dtype: None: bfloat16.
    """

    target: str
    model: str
    policy: Policy
    weight_dtype: str | None = None
    layers: int | None = None
    prefill: bool = False
    rows: int = 1

    def lm(self) -> LanguageModel:
        config = PRESETS[self.model]
        config = with_layers(config, self.layers or config.layers)
        model = nnx.eval_shape(
            lambda: Decoder(config, rngs=None, dtype=jnp.bfloat16, weight_dtype=self.weight_dtype)
        )
        return LanguageModel(weights_at(self.target, model), attention_backend=backend(self.target))

    def state(self, lm: LanguageModel) -> Any:
        policy = self.policy
        if self.layers and isinstance(policy, HeadSplit):
            policy = dataclasses.replace(policy, pattern=policy.pattern[: self.layers])
        return jax.eval_shape(lambda: lm.init_state(policy, seeds=range(self.rows)))

    def compiled(self, *, bytes_alone: bool) -> jax.stages.Compiled:
        """Compiled to run, or to count the bytes that it moves (see `OPTIONS`)."""
        lm = self.lm()
        put = functools.partial(at, self.target)
        state = put(self.state(lm))
        if self.prefill:
            tokens, length = ((1, CHUNK), (1,))
            shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (tokens, length)]
            lowered = lm.prefill.lower(state, *put(shapes))
        else:
            limit = put(jax.ShapeDtypeStruct((), jnp.int32))
            lowered = lm.decode.lower(state, limit, steps=1, sampling=Sampling(), stop_tokens=())
        return lowered.compile(OPTIONS if bytes_alone else None)


def ratio(full: float, duo: float) -> str:
    return f"**{full / duo:.2f}×**"


def memory() -> Iterator[list[str]]:
    """At 131,072 tokens, on a chip that full attention fits in too."""
    yield ["model", "retrieval heads", "rows", "", "full", "DuoAttention", "full / DuoAttention"]
    for model, rows in (("llama-2-7b", 1), ("llama-3-8b", 1), ("llama-3-8b", 4)):
        kv, needed = [], []
        for kind in ("full", "duo"):
            step = Step("v5p", model, policy_of(model, 131_072, kind), rows=rows)
            kv.append(bytes_of(step.state(step.lm()).caches))
            needed.append(total(step.compiled(bytes_alone=False)))
        for name, (full, duo) in (("cache (pytree)", kv), ("decode step (compiler)", needed)):
            sizes = [f"{size / GIB:.2f} GiB" for size in (full, duo)]
            start = [model, f"{RETRIEVAL[model]:.0%}", str(rows), name]
            yield [*start, *sizes, ratio(full, duo)]


def context() -> Iterator[list[str]]:
    """The longest that fits, of whole 8,192s, with int4 KV and 8-bit weights."""
    yield ["chip", "memory", "tokens", "decode step", "prefill of 512 tokens"]
    model, multiple = "llama-3-8b", 8192
    for target, limit in LIMITS.items():

        def step(tokens: int, target: str = target, **how: Any) -> Step:
            return Step(target, model, policy_of(model, tokens, "duo", "int4"), "int8", **how)

        def arguments(tokens: int) -> int:
            one = step(tokens)
            lm = one.lm()
            return bytes_of((lm._leaves, one.state(lm)))

        def besides(step: Step) -> int:
            """What the compiler adds to a step's arguments, of so few layers that it is quick."""
            few = step._replace(layers=2)
            lm, compiled = few.lm(), few.compiled(bytes_alone=False)
            known = bytes_of((lm._leaves, few.state(lm)))
            # Prefill needs no logits, and so does not count the head.
            return total(compiled) - min(known, compiled.memory_analysis().argument_size_in_bytes)

        def needed(tokens: int) -> float:
            try:
                return total(step(tokens).compiled(bytes_alone=False))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return math.inf

        base = arguments(multiple)
        slope = arguments(2 * multiple) - base
        most = int(1 + (limit - base) / slope) * multiple
        more = [besides(step(most, prefill=prefill)) for prefill in (False, True)]
        tokens = int(1 + (limit - base - max(more)) / slope) * multiple
        while (size := needed(tokens)) > limit:  # all layers
            tokens -= multiple
        sizes = [f"{x / GIB:.2f} GiB" for x in (limit, size, arguments(tokens) + more[1])]
        yield [target, sizes[0], f"{tokens:,}", *sizes[1:]]


def speed() -> Iterator[list[str]]:
    """Bytes of a decode step on v5e, from those of one and two layers."""
    yield ["model", "weights", "tokens", "full, MB", "DuoAttention, MB", "full / DuoAttention"]
    for model in RETRIEVAL:
        for weight_dtype in (None, "int8"):
            for tokens in (4096, 32_768, 131_072):
                moved = []
                for kind in ("full", "duo"):
                    few, more = (
                        Step(
                            *("v5e", model, policy_of(model, tokens, kind)),
                            weight_dtype=weight_dtype,
                            layers=layers,
                        )
                        .compiled(bytes_alone=True)
                        .cost_analysis()["bytes accessed"]
                        for layers in (1, 2)
                    )
                    moved.append(few + (more - few) * (PRESETS[model].layers - 1))
                yield [
                    *(model, weight_dtype or "bfloat16", f"{tokens:,}"),
                    *(f"{size / 1e6:,.0f}" for size in moved),
                    ratio(*moved),
                ]


def training() -> Iterator[list[str]]:
    """The longest step of a training of gates, of all layers, from those of one and two."""
    settings = read_config("configs/duo_llama3_8b.py")
    T, target, model = max(settings.lengths), "v5p", "llama-3-8b"

    def sizes(layers: int) -> np.ndarray:
        lm = Step(target, model, FullCache(1), layers=layers).lm()
        rows = PasskeyRows(settings.task, np.zeros(1, np.int32), list)
        gradient = GateTrainer(lm, settings, rows).gradient
        shapes = [((layers, lm.config.kv_heads), jnp.float32), ((1, T), jnp.int32), ((1, T), bool)]
        args = at(target, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        compiled = gradient.lower(*args).compile()
        memory = compiled.memory_analysis()
        return np.asarray([memory.argument_size_in_bytes, memory.temp_size_in_bytes])

    one, two = sizes(1), sizes(2)
    arguments, temporary = (one + (two - one) * (PRESETS[model].layers - 1)) / GIB
    yield ["chip", "model", "tokens", "weights", "temporary", "in all"]
    whole = f"{arguments + temporary:.1f} GiB of {MEMORY['v5p-8']:.1f}"
    yield [target, model, f"{T:,}", f"{arguments:.1f} GiB", f"{temporary:.1f} GiB", whole]


TABLES = {"memory": memory, "context": context, "speed": speed, "training": training}


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise app.UsageError(f"no arguments but flags are expected, got {argv[1:]}")
    out = []
    for name in FLAGS.tables:
        for i, row in enumerate(TABLES[name]()):
            lines = [f"| {' | '.join(row)} |"]
            if not i:
                lines.append(f"|{' --- |' * len(row)}")
            print("\n".join(lines), flush=True)
            out += lines
        print()
        out.append("")
    if FLAGS.out:
        with replaced(FLAGS.out) as part:
            part.write_text("\n".join(out), encoding="utf-8")


if __name__ == "__main__":
    define_flags()
    app.run(main)
