"""The Mosaic TPU kernel of `ring_decode` in interpret mode with race detection, against the
reference; its walk over the blocks by itself; and compiled for TPUs, with what XLA says of it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import targets
from pallas_kernels.flash.rule import Rule, ring_ticks, slot_of
from pallas_kernels.ring import Ring, empty_ring, quantised
from pallas_kernels.ring_decode import ring_decode, tpu

# Two cores share the rows and the groups of heads, in an order of their own. Memory that nobody has
# written is NaN. Races are counted, and asserted on after each run.
INTERPRET = pltpu.InterpretParams(
    detect_races=True, on_race="warn", num_cores_or_threads=2, random_seed=0
)
# Of float32 against float32 only the order of the sums differs: some 1e-6 of values up to 3.
EXACT = 1e-5
# With bfloat16 one of the two rounds a weight (2⁻⁹ of it) where the other keeps float32, and both
# round an output (2⁻⁹ of up to 4).
ROUNDED = 2e-2


@dataclasses.dataclass(frozen=True)
class Case:
    T: int = 1
    sinks: int = 4
    window: int = 300
    heads: int = 4
    kv_heads: int = 2
    D: int = 64
    dtype: str = "float32"
    q_dtype: str = "float32"
    rotated: bool = True
    alibi: bool = False
    soft_cap: float | None = None
    logits: bool = False
    block: int | None = 128
    seed: int = 0

    @property
    def options(self) -> dict:
        return dict(sinks=self.sinks, window=self.window, soft_cap=self.soft_cap, return_lse=True)

    def ticks(self, rng) -> np.ndarray:
        """Rows of every age: empty, young, part full, full, wrapped, wrapped and folded."""
        S, W = self.sinks, self.window
        old = S + W + int(rng.integers(1, 5 * W))
        ages = [0, min(2, S), rng.integers(1, S + W), S + W, old, S + W + (old - S + 17) % W]
        return np.array(ages, np.int32)

    def new(self, rng, rows: int) -> dict:
        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), self.q_dtype)

        H = self.heads
        return dict(
            q=normal(rows, self.T, H, self.D),
            k=normal(rows, self.T, self.kv_heads, self.D),
            v=normal(rows, self.T, self.kv_heads, self.D),
            q_sinks=normal(rows, self.T, H, self.D) if self.rotated else None,
            alibi_slopes=jnp.asarray(rng.uniform(0, 0.2, H), jnp.float32) if self.alibi else None,
            sink_logits=jnp.asarray(rng.standard_normal(H), jnp.float32) if self.logits else None,
        )

    def ring(self, rng, rows: int) -> Ring:
        shape = (rows, self.kv_heads, self.sinks + self.window, self.D)
        keys, values = (
            quantised(jnp.asarray(rng.standard_normal(shape), jnp.float32), self.dtype)
            for _ in range(2)
        )
        return Ring(keys[0], values[0], keys[1], values[1])


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    return Case(
        T=draw(st.integers(1, 4)),
        sinks=draw(st.sampled_from((0, 1, 4))),
        window=draw(st.sampled_from((5, 97, 200, 252, 300))),
        heads=kv_heads * draw(st.sampled_from((1, 2, 4))),
        kv_heads=kv_heads,
        D=draw(st.sampled_from((64, 80, 128))),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "int8", "int4"))),
        rotated=draw(st.booleans()),
        alibi=draw(st.booleans()),
        soft_cap=draw(st.sampled_from((None, 2.0))),
        logits=draw(st.booleans()),
        block=draw(st.sampled_from((128, 256))),
        seed=draw(st.integers(0, 1000)),
    )


@functools.partial(jax.jit, static_argnames=("case", "backend"))
def run(case: Case, backend: str, new: dict, ring: Ring, ticks):
    kernel = dict(block_size=case.block, interpret=INTERPRET) if backend == "tpu" else {}
    return ring_decode(ring=ring, ticks=ticks, backend=backend, **new, **case.options, **kernel)


def interpreted(*args):
    """The kernel's result, and whether the interpreter saw a race."""
    try:
        result = jax.block_until_ready(run(args[0], "tpu", *args[1:]))
        return result, interpreter.races.races_found
    except BaseException:
        interpreter.reset_tpu_interpret_mode_state()
        raise


def check(case: Case, new: dict, ring: Ring, ticks) -> Ring:
    (out, after, lse), raced = interpreted(case, new, ring, ticks)
    assert not raced
    expected = run(case, "reference", new, ring, ticks)
    tolerance = EXACT if case.q_dtype == "float32" and case.dtype != "bfloat16" else ROUNDED
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected[0], np.float32), rtol=0, atol=tolerance
    )
    np.testing.assert_allclose(lse, expected[2], rtol=0, atol=EXACT)
    for name, got, want in zip(Ring._fields, after, expected[1], strict=True):
        if got is not None:
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=name)
    return after


@settings(max_examples=4, deadline=None, derandomize=True)
@example(Case(T=8, D=128, dtype="int4", alibi=True))  # more tokens than tiles to write
@example(Case(T=5, D=64, dtype="int8", alibi=True))  # slots along the lanes
@example(Case(D=128, dtype="bfloat16", q_dtype="bfloat16", logits=True))
@given(cases())
def test_rows_of_every_age_against_the_reference(case):
    rng = np.random.default_rng(case.seed)
    ticks = case.ticks(rng)
    check(case, case.new(rng, len(ticks)), case.ring(rng, len(ticks)), ticks)


def test_steps_in_a_row_through_the_wrap():
    case = Case(T=2, window=130, dtype="int8")
    rng = np.random.default_rng(0)
    ticks = np.array([0, 125], np.int32)
    ring = case.ring(rng, 2)
    for _ in range(6):
        ring = check(case, case.new(rng, 2), ring, ticks)
        ticks = ticks + case.T


def test_a_planted_race_is_caught(monkeypatch):
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel", "parallel", "parallel"))
    case = Case(window=301)  # not traced before
    rng = np.random.default_rng(0)
    _, raced = interpreted(case, case.new(rng, 1), case.ring(rng, 1), np.array([900], np.int32))
    assert raced


@pytest.mark.parametrize("T", [1, 3, 8])
@pytest.mark.parametrize(
    "sinks, window, block", [(4, 60, 128), (4, 188, 64), (2, 200, 128), (1, 300, 64)]
)
def test_the_walk_reads_a_slot_once_and_never_what_it_writes(sinks, window, block, T):
    """The pipeline copies the block of the next step in, and the tile of the last one out, while a
    step computes. The interpreter copies in between, so what the overlap needs is proved here."""
    C = sinks + window
    walk = tpu.Walk(Rule(sinks, window, 1.0), T, C, block)
    ticks = np.array([*range(C + window + 1)], np.int32)
    steps = np.arange(walk.steps, dtype=np.int32)

    def table(f):
        return np.asarray(jax.vmap(lambda t: jax.vmap(lambda s: f(t, s))(steps))(ticks))

    blocks, idle = table(walk.at), np.asarray(walk.idle(ticks))
    slots = np.asarray(slot_of(ticks[:, None] + np.arange(T), sinks, window))
    np.testing.assert_array_equal(
        jax.vmap(lambda t: walk.held(t, np.arange(C, dtype=np.int32)))(ticks),
        ring_ticks(jnp.asarray(ticks), sinks, window),
    )
    for tile in (8, 64):
        tiles = table(lambda t, s, tile=tile: walk.tile(t, s, tile))
        for row, tick in enumerate(ticks):
            used = -(-min(tick + T, C) // block)
            read = blocks[row, idle[row] : walk.blocks]
            assert sorted(read) == list(range(used))
            assert set(blocks[row, : idle[row]]) <= {read[0]}
            writing = range(walk.blocks - 1, walk.steps)
            assert {tiles[row, s] for s in writing} == set(slots[row] // tile)
            for s in writing:
                assert tiles[row, s] * tile // block == blocks[row, s]
                if s + 1 < walk.steps and blocks[row, s + 1] != blocks[row, s]:
                    written = tiles[row, walk.blocks - 1 : s + 1] * tile // block
                    assert blocks[row, s + 1] not in written


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(D=72), "head_dim 72: expected one of 64, 80, 96, 128, 256"),
        (dict(T=9), "9 new tokens: expected at most 8"),
        (dict(block=100), "block_size 100: expected a multiple of 128"),
        (dict(q_dtype="float16"), "queries of float16: expected bfloat16 or float32"),
        (dict(dtype="float16"), "a ring of float16: expected one of float32, bfloat16, int8, int4"),
        (dict(T=2, window=125), "129 slots in blocks of 128: a last block shorter than the 2 new"),
        (dict(block=16384), "2 KV heads of 64 float32 in blocks of 16384: too much for VMEM"),
    ],
)
def test_refusals_say_why(change, sentence):
    case = Case(**change)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"backend 'tpu' can't serve this call: {sentence}"):
        run(case, "tpu", case.new(rng, 1), case.ring(rng, 1), np.zeros(1, np.int32))


def compiled(target: str, case: Case, rows: int = 1, layers: int = 1):
    """Layers of attention over rings of their own, donated; and the bytes of the rings."""
    sharding = targets.sharding(target)

    def shaped(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(new, rings, ticks):
        after = []
        for ring in rings:
            out, ring, _ = ring_decode(
                ring=ring, ticks=ticks, backend="tpu", block_size=case.block, **new, **case.options
            )
            new |= dict(q=out)
            after.append(ring)
        return new["q"], after

    new = case.new(np.random.default_rng(0), rows)
    C = case.sinks + case.window
    ring = jax.eval_shape(lambda: empty_ring(rows, case.kv_heads, C, case.D, case.dtype))
    args = jax.tree.map(shaped, (new, [ring] * layers, jax.ShapeDtypeStruct((rows,), jnp.int32)))
    total = layers * sum(x.size * tpu.BITS[x.dtype.name] // 8 for x in ring if x is not None)
    return jax.jit(step, donate_argnums=1).lower(*args).compile(), total


LLAMA = Case(window=4092, heads=32, kv_heads=8, D=128, q_dtype="bfloat16", block=None)


@pytest.mark.parametrize(
    "target, case",
    [
        ("v5e", dict(dtype="float32", q_dtype="float32", T=8, alibi=True, soft_cap=3.0)),
        ("v5e", dict(dtype="bfloat16", heads=9, kv_heads=3, D=64, window=1024, T=3)),
        ("v5e", dict(dtype="int4", heads=8, kv_heads=1, D=80, window=96, T=2, alibi=True)),
        ("v5e", dict(dtype="int8", heads=32, kv_heads=32, window=1020)),
        ("v5p", dict(dtype="bfloat16", D=256)),
        ("v5p", dict(dtype="int4", T=4)),
        ("v6e", dict(dtype="int8", D=64, window=1021, T=4)),
        ("v6e", dict(dtype="int4")),
        ("tpu7x", dict(dtype="bfloat16", D=96, heads=32, kv_heads=32)),
        ("tpu7x", dict(dtype="int4", T=2)),
    ],
)
def test_compiles(target, case):
    compiled(target, dataclasses.replace(LLAMA, **case))


@pytest.mark.parametrize(
    "case, most",
    [
        (dict(dtype="bfloat16"), 1.05),
        (dict(dtype="int8"), 1.05),
        # A quarter of the bytes, and as much around them.
        (dict(dtype="int4"), 1.06),
        # Half the bytes, and as much around them; the tile to write is 128 slots, not 32.
        (dict(dtype="int8", D=64), 1.08),
    ],
)
def test_xla_reads_the_ring_once_and_copies_nothing(case, most):
    step, total = compiled("v5e", dataclasses.replace(LLAMA, **case), rows=8, layers=2)
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= total
    # Queries and outputs, of 0.3 MB a layer: nothing of the size of a ring, or of its scales.
    assert memory.temp_size_in_bytes < 1e6
    assert step.cost_analysis()["bytes accessed"] <= most * total
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-done|transpose|pad)\(", step.as_text())
    assert all(np.prod([int(n) for n in c.split(",")]) < 1e5 for c in copied)
