"""The Mosaic TPU kernels of the attention core: in interpret mode, where races are looked for, and
compiled for chips that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import targets
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.flash import pairs, tpu, tpu_blocks
from pallas_kernels.flash.call import Call, Places
from pallas_kernels.flash.rule import EMPTY, Rule, block_map, ring_ticks, starts_of, visible
from pallas_kernels.ring import Ring, empty_ring, floats, stored
from pallas_kernels.sink_attention import sink_attention

INTERPRET = pltpu.InterpretParams(detect_races=True)

# Of the largest value. Float32: two orders of summing some 100 terms, and exp. Bfloat16, against
# the same values in float32: weights and score gradients are rounded to 8 bits before they are
# multiplied, the gradient of the output too.
TOLERANCE = {"float32": 4e-6, "bfloat16": 1.5e-2}


def assert_close(got, expected, dtype):
    """Both trees alike, and no race so far."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(b).max()))
    assert not interpreter.races.races_found


def both_ways(op, x, seed):
    """Output, log-sum-exp, and the gradients of both with respect to x."""
    (out, lse), pull = jax.vjp(op, x)
    rng = np.random.default_rng(seed)
    dout, dlse = (rng.standard_normal(a.shape).astype(np.float32) for a in (out, lse))
    # The log-sum-exp of a query that sees nothing is a constant.
    dlse = np.where(np.isneginf(lse), 0, dlse)
    return out, lse, pull((jnp.asarray(dout, out.dtype), jnp.asarray(dlse)))[0]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def as_dtype(x, dtype):
    """The values that `dtype` can hold, as float32 and as they are."""
    x = jax.tree.map(lambda a: a.astype(dtype), x)
    return jax.tree.map(lambda a: a.astype(jnp.float32), x), x


HEADS = st.sampled_from([(1, 1), (2, 1), (2, 2)])
DTYPES = st.sampled_from(["float32", "float32", "bfloat16"])


def case(T, sinks, window, heads, D, dtype, state, ticks, *options):
    names = ("rotated", "alibi", "soft_cap", "logits", "seed")
    named = dict(T=T, sinks=sinks, window=window, heads=heads, D=D, dtype=dtype, state=state)
    return example(**named, ticks=ticks, **dict(zip(names, options, strict=True)))


# Every state and every option once: a few draws leave some out.
@case(20, 4, 16, (2, 1), 64, "float32", "late", (-7, 60), True, True, None, True, 6)
@case(20, 4, 16, (2, 1), 64, "float32", "ring", (60, 11), True, True, None, True, 0)
@case(20, 20, 30, (2, 2), 80, "float32", "ring", (200, 1000), True, False, 2.0, False, 1)
@case(24, 1, 16, (2, 2), 128, "bfloat16", "ring", (0, 3), True, False, None, False, 2)
@case(36, 4, 7, (2, 1), 96, "float32", "packed", (0, 0), True, True, 2.0, False, 3)
@case(24, 4, None, (1, 1), 256, "bfloat16", "packed", (0, 0), False, True, None, False, 4)
@case(36, 4, 16, (2, 1), 64, "float32", "alone", (0, 0), False, False, None, False, 5)
@settings(max_examples=1, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 40),
    sinks=st.sampled_from([0, 1, 4, 20]),
    window=st.sampled_from([None, 1, 7, 16, 45]),
    heads=HEADS,
    D=st.sampled_from(tpu.HEAD_DIMS),
    dtype=DTYPES,
    state=st.sampled_from(["alone", "packed", "ring", "ring", "late"]),
    ticks=st.sampled_from([(0, 3), (60, 11), (200, 1000)]),
    rotated=st.booleans(),
    alibi=st.booleans(),
    soft_cap=st.sampled_from([None, 2.0]),
    logits=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sink_attention(
    T, sinks, window, heads, D, dtype, state, ticks, rotated, alibi, soft_cap, logits, seed
):
    (H, Hkv), rng = heads, np.random.default_rng(seed)
    B = 2 if state in ("ring", "late") else 1
    if state == "ring" and window is None:
        window = 30
    K = T + 19 if state == "late" else T  # keys from before the chunk, or from before the beginning
    x = dict(q=normal(rng, B, T, H, D), k=normal(rng, B, K, Hkv, D), v=normal(rng, B, K, Hkv, D))
    if rotated:
        x["q_sinks"] = normal(rng, B, T, H, D)
    options = dict(sinks=sinks, window=window, soft_cap=soft_cap, return_lse=True)
    if state == "ring":
        shape = (B, Hkv, sinks + window, D)
        x["ring"] = Ring(normal(rng, *shape), normal(rng, *shape))
        options["ticks"] = jnp.asarray(ticks, jnp.int32)
        if ticks[0] == 200:  # folded
            options["ticks"] = sinks + window + (options["ticks"] - sinks) % window
    if state == "late":
        options["ticks"] = jnp.asarray(ticks, jnp.int32)
    if state == "packed":
        options["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 4, (B, T))), jnp.int32)
    if alibi:
        options["alibi_slopes"] = jnp.abs(normal(rng, H))
    if logits:
        options["sink_logits"] = normal(rng, H)
    exact, x = as_dtype(x, dtype)

    expected = both_ways(lambda x: sink_attention(**x, **options, backend="reference"), exact, seed)
    options |= dict(backend="tpu", block_sizes=(16, 32), interpret=INTERPRET)
    got = both_ways(jax.jit(lambda x: sink_attention(**x, **options)), x, seed)
    assert got[0].dtype == x["q"].dtype
    assert_close(got, expected, dtype)


@pytest.mark.parametrize(
    ("kept", "dtype", "heads", "D", "sinks", "window", "ticks"),
    [
        ("int8", "float32", (4, 2), 64, 4, 296, (250, 900)),  # slots along the lanes
        ("int8", "bfloat16", (2, 2), 128, 0, 200, (0, 199)),
        ("int4", "float32", (3, 1), 128, 4, 196, (0, 777)),
        ("int4", "float32", (2, 2), 80, 130, 40, (33, 5000)),
        ("bfloat16", "float32", (2, 1), 64, 4, 200, (130, 300)),
    ],
)
def test_rings_of_other_dtypes(kept, dtype, heads, D, sinks, window, ticks):
    (H, Hkv), rng, B, T = heads, np.random.default_rng(0), 2, 20
    x = dict(q=normal(rng, B, T, H, D), k=normal(rng, B, T, Hkv, D), v=normal(rng, B, T, Hkv, D))
    if sinks:
        x["q_sinks"] = normal(rng, B, T, H, D)
    exact, x = as_dtype(x, dtype)
    shape = (B, Hkv, sinks + window, D)
    ring = stored(normal(rng, *shape), normal(rng, *shape), kept)
    options = dict(sinks=sinks, window=window, ticks=jnp.asarray(ticks), return_lse=True)
    expected = sink_attention(**exact, ring=floats(ring, "float32"), **options, backend="reference")
    options |= dict(backend="tpu", block_sizes=(16, 128), interpret=INTERPRET)
    got = jax.jit(lambda x, ring: sink_attention(**x, ring=ring, **options))(x, ring)
    assert_close(got, expected, dtype)


def test_what_nobody_sees_is_not_dequantised():
    """A scale of NaN spoils every block that is read."""
    q, ring = jnp.ones((1, 4, 1, 64)), stored(*[jnp.ones((1, 1, 256, 64))] * 2, "int8")
    poison = jnp.where(jnp.arange(256) < 128, 1.0, jnp.nan)
    ring = ring._replace(k_scale=ring.k_scale * poison, v_scale=ring.v_scale * poison)
    options = dict(ring=ring, window=256, backend="tpu", block_sizes=(16, 128), interpret=INTERPRET)
    for tick, whole in (100, True), (200, False):
        out = sink_attention(q, q, q, ticks=jnp.asarray([tick]), **options)
        assert np.isfinite(out).all() == whole


@example(T=40, before=5, heads=(2, 1), by="head", rows=2, dtype="float32", soft_cap=None, seed=0)
@example(
    T=20, before=24, heads=(2, 2), by="kv head", rows=1, dtype="bfloat16", soft_cap=2.0, seed=1
)
@settings(max_examples=1, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 60),
    before=st.sampled_from([0, 5, 40]),
    heads=HEADS,
    by=st.sampled_from(["one", "kv head", "head"]),
    rows=st.sampled_from([1, 2]),
    dtype=DTYPES,
    soft_cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_block_sparse_attention(T, before, heads, by, rows, dtype, soft_cap, seed):
    (H, Hkv), rng, D, K = heads, np.random.default_rng(seed), 64, T + before
    count_q, count_k = -(-T // 16), -(-K // 32)
    shape = (rows, {"one": 1, "kv head": Hkv, "head": H}[by], count_q, 3)
    blocks = jnp.asarray(rng.integers(-1, count_k, shape), jnp.int32)
    exact, x = as_dtype(
        dict(q=normal(rng, 2, T, H, D), k=normal(rng, 2, K, Hkv, D), v=normal(rng, 2, K, Hkv, D)),
        dtype,
    )
    options = dict(blocks=blocks, block_sizes=(16, 32), soft_cap=soft_cap, return_lse=True)

    def op(backend, **more):
        return jax.jit(lambda x: block_sparse_attention(**x, **options, backend=backend, **more))

    expected = both_ways(op("reference"), exact, seed)
    assert_close(both_ways(op("tpu", interpret=INTERPRET), x, seed), expected, dtype)


@pytest.mark.parametrize("planted", [False, True])
def test_races_of_two_cores(monkeypatch, planted):
    """Programs share nothing that they write. Where the second row takes the blocks of the first,
    they do, and that is found."""
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    x = normal(np.random.default_rng(0), 2, 24, 1, 64)

    def op(**options):
        return sink_attention(x, x, x, window=9, return_lse=True, block_sizes=(16, 16), **options)

    if not planted:
        got = op(backend="tpu", interpret=two)
        return assert_close(got, op(backend="reference"), "float32")
    spec = tpu_blocks.Grid._spec
    monkeypatch.setattr(
        tpu_blocks.Grid,
        "_spec",
        lambda self, shape, index: spec(self, shape, lambda b, h, i, j: index(0, h, i, j)),
    )
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(op(backend="tpu", interpret=two))
    pltpu.reset_tpu_interpret_mode_state()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 90),
    sinks=st.integers(0, 20),
    window=st.one_of(st.none(), st.integers(1, 60)),
    blocks=st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 16)]),
    kind=st.sampled_from(["alone", "packed", "ring", "late"]),
    tick=st.integers(-40, 300),
    seed=st.integers(0, 99),
)
def test_lists(T, sinks, window, blocks, kind, tick, seed):
    """Every pair with a visible key is listed, once, and the list is not longer than its bound."""
    if kind == "ring" and window is None:
        window = 60
    tick = 0 if kind == "packed" else tick if kind == "late" else abs(tick)
    rule = Rule(sinks, window, 1.0)
    more = seed % 40 if kind == "late" else 0
    k_ticks = jnp.maximum(jnp.arange(more + T, dtype=jnp.int32)[None] + tick, EMPTY)
    q_ticks = k_ticks[:, more:]
    starts = jnp.zeros_like(q_ticks)
    if kind == "packed":
        ids = np.sort(np.random.default_rng(seed).integers(0, 4, (1, T)))
        starts = starts_of(jnp.asarray(ids, jnp.int32))
    if kind == "ring":
        k_ticks = ring_ticks(jnp.asarray([tick], jnp.int32), sinks, window)
    K = k_ticks.shape[1]
    bound = pairs.bound(rule, T, K, *blocks, own=kind != "ring", packed=kind == "packed")
    call = Call(rule, *blocks, 0, jnp.float32, None, bound, kind != "packed")
    size = bound.near + bound.far

    @jax.jit
    def build(q_ticks, k_ticks, starts):
        listed = block_map(rule, q_ticks, k_ticks, starts, *blocks)[:, None]
        state = pairs.states(call, Places(q_ticks, k_ticks, starts, None, listed), True)[0]
        by_query = pairs.pair_list(state, size + bound.idle)[0]
        by_key = pairs.pair_list(state.swapaxes(1, 2), size + state.shape[2])[0]
        seen = visible(rule, q_ticks[0, :, None], k_ticks, starts[0, :, None])
        near = seen & (k_ticks - starts[0, :, None] >= sinks)
        return state[0], by_query, by_key, near, seen & ~near

    state, by_query, by_key, near, far = map(np.asarray, build(q_ticks, k_ticks, starts))
    for bit, wanted in (pairs.NEAR, near), (pairs.FAR, far):
        wanted = np.pad(wanted, [(0, -T % blocks[0]), (0, -K % blocks[1])])
        wanted = wanted.reshape(-1, blocks[0], wanted.shape[1] // blocks[1], blocks[1])
        assert not np.any(wanted.any(axis=(1, 3)) & (state & bit == 0))
    assert (state & pairs.NEAR != 0).sum() <= bound.near
    assert (state != 0).sum() <= size

    for table, words in (state, by_query), (state.T, by_key):
        outer, inner = pairs.outer_of(words), pairs.inner_of(words)
        found = np.zeros_like(table)
        np.add.at(found, (outer, inner), words & (pairs.NEAR | pairs.FAR))
        np.testing.assert_array_equal(found, table)
        for bit in pairs.FIRST, pairs.LAST:
            np.testing.assert_array_equal(outer[words & bit != 0], np.arange(len(table)))
        assert np.all(np.diff(outer) >= 0)


@pytest.mark.parametrize("chunk", [512, 1024, 2048, 4096, 32768])
def test_work(chunk):
    """Scores that a prefill of 32,768 tokens computes, to those that 4 + 4,092 grants."""
    rule, tokens = Rule(4, 4092, 1.0), 32_768
    block_q, block_k = tpu.block_sizes(128, jnp.dtype(jnp.bfloat16))
    sizes = [(chunk, True)] if chunk == tokens else [(chunk, True), (4096, False)]
    computed = 0
    for keys, own in sizes:
        b = pairs.bound(rule, chunk, keys, block_q, block_k, own=own, packed=False)
        computed += block_q * (b.near * block_k + b.far * 16)
    row = np.arange(tokens)[-chunk:]
    if chunk == tokens:
        granted = np.minimum(row + 1, 4096).sum()
    else:
        granted = 4096 * chunk
    assert granted <= computed <= 1.15 * granted


@pytest.mark.parametrize(
    ("name", "D", "dtype"),
    [
        ("v4", 128, "bfloat16"),
        ("v5e", 256, "float32"),
        ("v5p", 80, "float32"),
        ("v6e", 96, "bfloat16"),
        ("tpu7x", 64, "bfloat16"),
    ],
)
def test_compiles(name, D, dtype):
    """Forward and backward, over a ring and a ragged chunk."""
    sharding = targets.sharding(name)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    B, T, H, Hkv, S, W = 1, 300, 2, 1, 4, 1020
    q, k = array(B, T, H, D), array(B, T, Hkv, D)
    ring = Ring(*(array(B, Hkv, S + W, D) for _ in "kv"))

    def loss(q, q_sinks, k, v, ring, ticks):
        out = sink_attention(
            q, k, v, sinks=S, window=W, q_sinks=q_sinks, ring=ring, ticks=ticks, backend="tpu"
        )
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    compiled = gradient.lower(q, q, k, k, ring, array(B, dtype="int32")).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 6


@pytest.mark.parametrize(
    ("name", "D", "kept", "dtype"),
    [
        ("v4", 128, "int8", "bfloat16"),
        ("v5e", 80, "int4", "bfloat16"),
        ("v5e", 64, "bfloat16", "float32"),
        ("v6e", 128, "int4", "bfloat16"),
        ("v5p", 256, "int4", "float32"),
        ("v6e", 64, "int8", "float32"),
        ("tpu7x", 96, "int8", "bfloat16"),
    ],
)
def test_rings_of_other_dtypes_compile(name, D, kept, dtype):
    sharding = targets.sharding(name)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    B, T, H, Hkv, S, W = 2, 300, 6, 3, 4, 1021
    q, k = array(B, T, H, D), array(B, T, Hkv, D)
    ring = jax.eval_shape(lambda: empty_ring(B, Hkv, S + W, D, kept))
    ring = jax.tree.map(lambda a: array(*a.shape, dtype=a.dtype), ring)

    def op(q, q_sinks, k, v, ring, ticks):
        return sink_attention(
            q, k, v, sinks=S, window=W, q_sinks=q_sinks, ring=ring, ticks=ticks, backend="tpu"
        )

    compiled = jax.jit(op).lower(q, q, k, k, ring, array(B, dtype="int32")).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2


def test_refuses():
    def call(D=64, dtype=jnp.float32, **options):
        x = jnp.ones((1, 64, 1, D), dtype)
        sink_attention(x, x, x, backend="tpu", **options)

    with pytest.raises(ValueError, match="head_dim 72: expected one of 64, 80, 96, 128, 256"):
        call(72)
    with pytest.raises(ValueError, match="float16"):
        call(dtype=jnp.float16)
    with pytest.raises(ValueError, match="block_q 24"):
        call(block_sizes=(24, 64))
    with pytest.raises(ValueError, match="block_k 64: expected a multiple of 128 for int8"):
        ring = empty_ring(1, 1, 256, 64, "int8")
        options = dict(backend="tpu", block_sizes=(64, 64), window=256)
        jax.eval_shape(
            lambda x, ticks: sink_attention(x, x, x, ring=ring, ticks=ticks, **options),
            jnp.ones((1, 64, 1, 64)),
            jnp.zeros(1, "int32"),
        )
    with pytest.raises(ValueError, match="more than VMEM holds"):
        jax.eval_shape(
            lambda x: sink_attention(x, x, x, backend="tpu", block_sizes=(2048, 2048)),
            jnp.ones((1, 4096, 1, 64)),
        )
    x = jnp.ones((1, 1 << 15, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="scalar memory"):
        jax.eval_shape(lambda x: sink_attention(x, x, x, backend="tpu", block_sizes=(32, 32)), x)


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "tpu7x"])
def test_lists_compile(name):
    """Forward and backward; with a list per head that scalar memory holds only in parts."""
    T, H, Hkv, N = (32_768, 32, 8, 32) if name == "v5e" else (512, 4, 2, 2)
    sharding = targets.sharding(name)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(q, k, v, blocks):
        out = block_sparse_attention(q, k, v, blocks, block_sizes=(128, 128), backend="tpu")
        return jnp.sum(out.astype(jnp.float32))

    shapes = [array(1, T, heads, 128) for heads in (H, Hkv, Hkv)]
    blocks = array(1, H, T // 128, N, dtype=jnp.int32)
    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, blocks).compile()
