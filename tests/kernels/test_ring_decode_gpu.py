"""The Mosaic GPU kernel of `ring_decode`, interpreted with race detection, and compiled for the
H200."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    get_races,
    reset_gpu_interpret_mode_state,
)

from pallas_kernels import targets
from pallas_kernels.ring import Ring, quantised
from pallas_kernels.ring_decode import gpu, ring_decode

DTYPES = ("bfloat16", "float32", "int8", "int4")


class Case(NamedTuple):
    seed: int
    T: int
    heads: tuple[int, int]
    head_dim: int
    sinks: int
    window: int
    dtype: str
    q_dtype: str
    ticks: list[int]
    q_sinks: bool
    alibi: bool
    soft_cap: float | None
    block_size: int | None
    small_chip: bool  # where a block has several tiles, more than are in flight


@st.composite
def cases(draw) -> Case:
    T = draw(st.integers(1, 3))
    S = draw(st.integers(0, 5))
    dtype = draw(st.sampled_from(DTYPES))
    W = draw(st.integers(T, 90))
    if dtype.startswith("int"):
        W += -(S + W) % 4
    full = S + W
    tick = st.one_of(
        st.just(0),
        st.integers(0, full),  # part full: sinks alone, too
        st.integers(full, 5 * full),  # wrapped
        st.integers(full, full + W - 1).map(lambda t: S + W + (t - S) % W),  # folded
        st.integers(2**30, 2**31 - 2 * full),
    )
    return Case(
        seed=draw(st.integers(0, 2**16)),
        T=T,
        heads=draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1)])),
        head_dim=draw(st.sampled_from([64, 64, 80] if dtype != "int4" else [64, 96])),
        sinks=S,
        window=W,
        dtype=dtype,
        q_dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        ticks=draw(st.lists(tick, min_size=1, max_size=2)),
        q_sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        soft_cap=draw(st.sampled_from([None, 5.0])),
        block_size=draw(st.sampled_from([None, 32])),
        small_chip=draw(st.booleans()),
    )


def tokens(rng, case: Case) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    B, (H, Hkv) = len(case.ticks), case.heads
    q, k, v, q_sinks = (
        jnp.asarray(rng.standard_normal((B, case.T, h, case.head_dim)), case.q_dtype)
        for h in (H, Hkv, Hkv, H)
    )
    return q, k, v, q_sinks if case.q_sinks else None


def inputs(case: Case):
    rng = np.random.default_rng(case.seed)
    shape = (len(case.ticks), case.heads[1], case.sinks + case.window, case.head_dim)
    k, v = (quantised(jnp.asarray(rng.standard_normal(shape)), case.dtype) for _ in range(2))
    slopes = jnp.asarray(rng.uniform(0, 1, case.heads[0])) if case.alibi else None
    ticks = jnp.asarray(case.ticks, jnp.int32)
    return tokens(rng, case), Ring(k[0], v[0], k[1], v[1]), ticks, slopes


def runner(case: Case, backend: str):
    options = {}
    if backend == "gpu":
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        options = dict(block_size=case.block_size, interpret=interpret)

    @jax.jit
    def run(new, ring, ticks, slopes):
        q, k, v, q_sinks = new
        if backend == "reference":  # in full precision, whatever it would round to else
            if case.dtype == "bfloat16":
                k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
                k, v, ring = jax.tree.map(lambda x: x.astype(jnp.float32), (k, v, ring))
            q, q_sinks = jax.tree.map(lambda x: x.astype(jnp.float32), (q, q_sinks))
        sizes = (1, 2) if case.small_chip else (gpu.SMS, gpu.STAGES)
        with mock.patch.multiple(gpu, SMS=sizes[0], STAGES=sizes[1]):
            return ring_decode(
                q,
                k,
                v,
                ring,
                ticks,
                sinks=case.sinks,
                window=case.window,
                q_sinks=q_sinks,
                alibi_slopes=slopes,
                soft_cap=case.soft_cap,
                return_lse=True,
                backend=backend,
                **options,
            )

    return run


def assert_close(got, want, q_dtype: str) -> None:
    out, ring, lse = got
    want_out, want_ring, want_lse = want
    assert [x is None for x in ring] == [x is None for x in want_ring]
    for held, want_held in zip(jax.tree.leaves(ring), jax.tree.leaves(want_ring), strict=True):
        np.testing.assert_array_equal(held.astype(jnp.float32), want_held.astype(jnp.float32))
    # Scores are exact products summed in float32 in both. With bfloat16 queries the weights and the
    # output are rounded to 8 bits: together off by at most 2^-8 of the largest value, some 5. With
    # float32 ones, sums of a hundred products of order 1 are taken in another order.
    tolerance = 5 * 2**-8 if q_dtype == "bfloat16" else 5e-6
    np.testing.assert_allclose(out.astype(jnp.float32), want_out, atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-6)


def raced() -> bool:
    return get_races().races_found


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases())
def test_as_the_reference(case):
    arguments = inputs(case)
    got = jax.block_until_ready(runner(case, "gpu")(*arguments))
    assert not raced()
    assert_close(got, runner(case, "reference")(*arguments), case.q_dtype)


PLAIN = Case(
    seed=0,
    T=1,
    heads=(2, 1),
    head_dim=64,
    sinks=2,
    window=98,
    dtype="bfloat16",
    q_dtype="bfloat16",
    ticks=[97, 3],
    q_sinks=False,
    alibi=False,
    soft_cap=None,
    block_size=32,
    small_chip=True,
)


@pytest.mark.parametrize("T, dtype", [(1, "int4"), (2, "bfloat16")])
def test_steps_in_a_row(T, dtype):
    """Over the edge of the ring, each step from the ring that the last one left."""
    case = PLAIN._replace(T=T, dtype=dtype, q_sinks=True)
    _, ring, ticks, slopes = inputs(case)
    run, reference = runner(case, "gpu"), runner(case, "reference")
    rng = np.random.default_rng(1)
    want_ring = ring
    for _ in range(4):
        new = tokens(rng, case)
        got = jax.block_until_ready(run(new, ring, ticks, slopes))
        assert not raced()
        want = reference(new, want_ring, ticks, slopes)
        assert_close(got, want, case.q_dtype)
        ring, want_ring, ticks = got[1], want[1], ticks + T


def test_a_planted_race_is_caught(monkeypatch):
    """Reading keys and values before their copy is there."""
    wait = plgpu.barrier_wait

    def hasty(barrier):
        if not hasattr(barrier, "transforms"):  # those of tiles are one of an array
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", hasty)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
        jax.block_until_ready(runner(PLAIN, "gpu")(*inputs(PLAIN)))
    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(
    "dtype, q_dtype, head_dim",
    [
        ("bfloat16", "bfloat16", 128),
        ("bfloat16", "bfloat16", 80),
        ("float32", "float32", 64),
        ("int8", "bfloat16", 128),
        ("int4", "bfloat16", 128),
    ],
)
def test_compiles_for_an_h200_in_place(dtype, q_dtype, head_dim):
    B, Hkv, G, C, S = 16, 8, 4, 4096, 4
    sharding = targets.sharding("h200")

    def shape(*dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    kv = shape(B, Hkv, C, head_dim, dtype=dtype)
    scale = shape(B, Hkv, C, dtype=jnp.float32) if dtype.startswith("int") else None
    q = shape(B, 1, Hkv * G, head_dim, dtype=q_dtype)
    new = shape(B, 1, Hkv, head_dim, dtype=q_dtype)
    ticks = shape(B, dtype=jnp.int32)

    def step(ring, q, q_sinks, k, v, ticks):
        return ring_decode(
            q, k, v, ring, ticks, sinks=S, window=C - S, q_sinks=q_sinks, backend="gpu"
        )

    arguments = (Ring(kv, kv, scale, scale), q, q, new, new, ticks)
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    bits = {"bfloat16": 16, "float32": 32, "int8": 8, "int4": 4}[dtype]
    one = B * Hkv * C * head_dim * bits // 8
    # All of the ring is written in place, and no copy of any part of it is made.
    assert memory.alias_size_in_bytes == 2 * one + (0 if scale is None else 2 * B * Hkv * C * 4)
    assert memory.temp_size_in_bytes < one // 8


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(head_dim=72), "head_dim 72: expected one of 64, 80, 96, 128, 256"),
        (dict(head_dim=80, dtype="int4"), "a row must be a multiple of 16 bytes"),
        (dict(heads=(70, 1)), "70 query rows a KV head"),
        (dict(window=97, dtype="int8"), "a ring of 99 slots with scales: expected a multiple of 4"),
        (dict(block_size=16, T=17), "17 new tokens: at most block_size, 16"),
        (dict(block_size=48), "block_size 48: expected one of 64, 32, 16"),
        (dict(q_dtype="float16"), "queries of float16"),
        (dict(head_dim=256, dtype="float32", q_dtype="float32"), "shared memory"),
    ],
)
def test_refuses_with_a_sentence(change, sentence):
    case = PLAIN._replace(**{"block_size": None, **change})
    with pytest.raises(ValueError, match=sentence):
        runner(case, "gpu")(*inputs(case))
