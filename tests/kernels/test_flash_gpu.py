"""The Mosaic GPU kernels in interpret mode with race detection, against the reference; and compiled
for an H200."""

import dataclasses
import sys
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import targets
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.flash import gpu
from pallas_kernels.ring import Ring, empty_ring, floats, stored
from pallas_kernels.sink_attention import sink_attention

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)

# The reference takes the same bfloat16 inputs as float32. The kernels round weights and their
# gradients to bfloat16 (2⁻⁹ each, of sums of terms of either sign) and so does the output, which
# the backward pass starts from. Relative to the largest element:
TOLERANCE = 0.01
# Scores and their sums stay in float32.
LSE_TOLERANCE = 1e-4


def interpreted(f, *args):
    """The result of f under the interpreter, and whether it found a race."""
    try:
        result = jax.block_until_ready(jax.jit(f)(*args))
        return result, interpreter.get_races().races_found
    except BaseException:
        interpreter.reset_gpu_interpret_mode_state()
        raise


def assert_close(got, expected):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        g, e = np.asarray(g, np.float32), np.asarray(e, np.float32)
        atol = TOLERANCE * max(np.abs(e).max(), 0.1)
        np.testing.assert_allclose(g, e, rtol=0, atol=atol)


@dataclasses.dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 150
    heads: int = 2
    kv_heads: int = 1
    D: int = 64
    sinks: int = 0
    window: int | None = None
    before: int | None = None  # tokens in a ring; None: no ring
    rotated: bool = False
    alibi: bool = False
    packed: bool = False
    late: int = 0  # keys from before the chunk, of which half come before the beginning
    soft_cap: float | None = None
    blocks: tuple[int, int] = (64, 64)
    seed: int = 0

    def arrays(self):
        """What gradients flow to, and the rest."""
        rng = np.random.default_rng(self.seed)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

        def keys():
            return normal(self.B, self.late + self.T, self.kv_heads, self.D)

        x = dict(q=normal(self.B, self.T, self.heads, self.D), k=keys(), v=keys())
        if self.rotated:
            x["q_sinks"] = normal(*x["q"].shape)
        rest = {}
        if self.before is not None:
            shape = (self.B, self.kv_heads, self.sinks + self.window, self.D)
            x["ring"] = Ring(normal(*shape), normal(*shape))
            rest["ticks"] = jnp.full(self.B, self.before, jnp.int32)
        if self.late:
            rest["ticks"] = jnp.full(self.B, -(self.late // 2), jnp.int32)
        if self.alibi:
            rest["alibi_slopes"] = jnp.asarray(2.0 ** -np.arange(1, self.heads + 1), jnp.float32)
        if self.packed:
            ids = np.sort(rng.integers(0, 4, (self.B, self.T)), axis=1)
            rest["segment_ids"] = jnp.asarray(ids, jnp.int32)
        return x, rest, (normal(*x["q"].shape), normal(*x["q"].shape[:3]))

    def check(self, *, gradients: bool):
        x, rest, weights = self.arrays()

        def run(x, backend, **options):
            def loss(x):
                out, lse = sink_attention(
                    **x,
                    **rest,
                    sinks=self.sinks,
                    window=self.window,
                    soft_cap=self.soft_cap,
                    return_lse=True,
                    backend=backend,
                    block_sizes=self.blocks,
                    **options,
                )
                return weighted(out, lse, weights), (out, lse)

            return jax.grad(loss, has_aux=True)(x) if gradients else (None, loss(x)[1])

        check(run, x)


def weighted(out, lse, weights):
    """A loss in which every output counts."""
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return jnp.sum(out.astype(jnp.float32) * weights[0]) + jnp.sum(lse * weights[1])


def check(run, x):
    """Runs the kernel on x, the reference on x in float32, and compares."""
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    expected, (out, lse) = jax.jit(lambda x: run(x, "reference"))(exact)
    (got, (got_out, got_lse)), races = interpreted(lambda x: run(x, "gpu", interpret=INTERPRET), x)
    assert not races
    np.testing.assert_allclose(got_lse, lse, rtol=0, atol=LSE_TOLERANCE)
    assert_close(got_out, out)
    assert_close(got, expected)


@st.composite
def cases(draw):
    window = draw(st.sampled_from([None, 40, 100]))
    ring = window is not None and draw(st.booleans())
    return Case(
        B=draw(st.integers(1, 2)),
        T=draw(st.integers(1, 180)),
        heads=draw(st.sampled_from([1, 2])),
        D=draw(st.sampled_from([64, 80])),
        sinks=draw(st.sampled_from([0, 4, 70])),
        window=window,
        before=draw(st.integers(0, 300)) if ring else None,
        rotated=draw(st.booleans()),
        alibi=draw(st.booleans()),
        packed=not ring and draw(st.booleans()),
        soft_cap=draw(st.sampled_from([None, 3.0])),
        blocks=draw(st.sampled_from([(64, 64), (128, 64), (128, 128)])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=3, derandomize=True, deadline=None)
@given(cases())
@example(Case(T=300, D=128, sinks=4, window=130, blocks=(128, 128)))
@example(Case(T=90, window=32, late=70))
def test_output(case):
    case.check(gradients=False)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=150, sinks=4, window=60, rotated=True, alibi=True),
        Case(T=130, heads=1, D=256, sinks=2, window=50, packed=True, soft_cap=3.0),
    ],
    ids=["sweeps", "wide"],
)
def test_gradients(case):
    case.check(gradients=True)


def test_block_sparse():
    rng = np.random.default_rng(3)
    T, K, H = 150, 200, 2
    x = [
        jnp.asarray(rng.standard_normal((1, n, h, 64)), jnp.bfloat16)
        for n, h in ((T, H), (K, 1), (K, 1))
    ]
    shape = (1, H, 3, 3)
    blocks = jnp.asarray(rng.integers(-1, 4, shape), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((1, T, H, 64))), jnp.ones((1, T, H))

    def run(x, backend, **options):
        def loss(x):
            out, lse = block_sparse_attention(
                *x, blocks, block_sizes=(64, 64), return_lse=True, backend=backend, **options
            )
            return weighted(out, lse, weights), (out, lse)

        return jax.grad(loss, has_aux=True)(x)

    check(run, x)


@pytest.mark.parametrize(
    ("kept", "heads", "ticks", "slab"),
    [("int8", (2, 1), (0, 100), 128), ("int4", (2, 2), (250, 777), 1024)],
)
def test_quantised_rings(monkeypatch, kept, heads, ticks, slab):
    """In slabs of which the last is shorter; all of it shorter than a slab."""
    monkeypatch.setattr(gpu, "SLAB", slab)
    (H, Hkv), rng, S, W, D = heads, np.random.default_rng(0), 4, 296, 64

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    x = dict(q=normal(2, 60, H, D), k=normal(2, 60, Hkv, D), v=normal(2, 60, Hkv, D))
    x["q_sinks"] = normal(*x["q"].shape)
    ring = stored(normal(2, Hkv, S + W, D), normal(2, Hkv, S + W, D), kept)
    options = dict(sinks=S, window=W, ticks=jnp.asarray(ticks), return_lse=True)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), x) | dict(ring=floats(ring, jnp.float32))
    out, lse = sink_attention(**exact, **options, backend="reference")
    options |= dict(backend="gpu", block_sizes=(64, 64), interpret=INTERPRET)
    (got, got_lse), races = interpreted(
        lambda x, ring: sink_attention(**x, ring=ring, **options), x, ring
    )
    assert not races
    assert_close(got, out)
    # Keys are rounded to bfloat16 once more: sums of 64 products are off by some 2⁻⁹.
    np.testing.assert_allclose(got_lse, lse, rtol=0, atol=5e-3)


def test_a_long_quantised_ring_has_no_copy_in_floats():
    sharding = targets.sharding("h200")

    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ring = jax.eval_shape(lambda: empty_ring(1, 2, 1 << 17, 128, "int8"))
    ring = jax.tree.map(lambda a: shaped(*a.shape, dtype=a.dtype), ring)

    def op(q, k, v, ring, ticks):
        return sink_attention(q, k, v, window=1 << 17, ring=ring, ticks=ticks, backend="gpu")

    q, k = shaped(1, 500, 8, 128), shaped(1, 500, 2, 128)
    args = q, k, k, ring, shaped(1, dtype=jnp.int32)
    memory = jax.jit(op).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2 * ring.k.size / 8


def test_a_race_is_caught(monkeypatch):
    """A kernel that does not wait for its first keys is told so."""

    def careless_wait(barrier):
        if sys._getframe(1).f_code.co_name != "await_first":
            plgpu.barrier_wait(barrier)

    careless = types.SimpleNamespace(**vars(plgpu) | {"barrier_wait": careless_wait})
    monkeypatch.setattr(gpu, "plgpu", careless)
    x, _, _ = Case(T=64, heads=1).arrays()
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(lambda x: sink_attention(**x, backend="gpu", interpret=INTERPRET), x)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_compiles_for_an_h200(D):
    sharding = targets.sharding("h200")

    def shaped(heads):
        return jax.ShapeDtypeStruct((1, 1000, heads, D), jnp.bfloat16, sharding=sharding)

    def loss(q, k, v, q_sinks):
        out = sink_attention(q, k, v, q_sinks=q_sinks, sinks=4, window=500, backend="gpu")
        return jnp.sum(out.astype(jnp.float32))

    args = shaped(4), shaped(2), shaped(2), shaped(4)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*args).compile()
    assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(D=72), "head_dim 72: expected one of 64, 80, 96, 128, 256"),
        (dict(blocks=(64, 32)), r"block_sizes \(64, 32\): expected multiples of 64"),
    ],
)
def test_refuses(change, why):
    x, _, _ = Case(T=64, heads=1, **change).arrays()
    sizes = change.get("blocks")
    with pytest.raises(ValueError, match=why):
        sink_attention(**x, backend="gpu", block_sizes=sizes)


def test_refuses_float32():
    x = jnp.zeros((1, 64, 1, 64))
    with pytest.raises(ValueError, match="q is float32: expected bfloat16"):
        sink_attention(x, x, x, backend="gpu")
