"""SinkRing and FullCache against the definition in float64, in every way that tokens can come."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from pallas_kernels import targets
from pallas_kernels.ring import quantised
from sinkjax.caches import CacheFull, FullCache, SinkRing
from sinkjax.caches.protocol import Scores
from sinkjax.models import Rotary
from tests import oracle

# Float32 against float64. Scores of these inputs reach 10, where the angles' rounding (2e-7 rad)
# and the sums' give 1e-5 of the largest output; the issue allows 3e-5.
TOLERANCE = 3e-5
D = 16


@functools.cache
def inputs(T: int, heads: int, kv_heads: int, batch: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = ((batch, T, h, D) for h in (heads, kv_heads, kv_heads))
    return tuple(rng.standard_normal(s).astype(np.float32) * 1.5 for s in shape)


@functools.partial(jax.jit, static_argnums=5)
def attend(cache, q, k, v, lengths, rotary):
    return cache.attend(q, k, v, rotary, lengths)


def streamed(policy, q, k, v, chunks, rotary, start=0, dtype=jnp.float32):
    """The outputs of a whole sequence fed in chunks of the given sizes, repeated."""
    B, T, _, _ = q.shape
    cache = policy.init(batch=B, kv_heads=k.shape[2], head_dim=D, dtype=dtype)
    position = jnp.full(B, start, jnp.uint32)
    cache = dataclasses.replace(cache, clock=dataclasses.replace(cache.clock, position=position))
    out, t, i = [], 0, 0
    while t < T:
        n = min(chunks[i % len(chunks)], T - t)
        y, cache = attend(cache, *(x[:, t : t + n] for x in (q, k, v)), None, rotary)
        out.append(np.asarray(y))
        t, i = t + n, i + 1
    return np.concatenate(out, axis=1), cache


def error(out, expected) -> float:
    return np.abs(out - expected).max() / np.abs(expected).max()


@functools.cache
def expected(sinks, window, positions, heads, kv_heads, T):
    q, k, v = inputs(T, heads, kv_heads)
    return oracle.attention(
        q[0],
        k[0],
        v[0],
        sinks=sinks,
        window=window,
        positions=positions,
        theta=oracle.frequencies(D, 10_000.0),
    )


HEADS = [(4, 4), (6, 2), (4, 1)]  # MHA, GQA, MQA


CASES = [
    *itertools.product(["cache"], [0, 1, 4], HEADS, [(1,), (7,), (128,)]),
    *itertools.product(["absolute"], [4], [(6, 2)], [(1,), (7, 33)]),
    ("cache", 4, (6, 2), (1, 5, 64, 2)),
]


@pytest.mark.parametrize("positions,sinks,heads,chunks", CASES)
def test_ring_equals_the_definition_through_ten_wraps(positions, sinks, heads, chunks):
    window, T = 30, 340
    heads, kv_heads = heads
    q, k, v = inputs(T, heads, kv_heads)
    out, _ = streamed(SinkRing(sinks, window, positions), q, k, v, chunks, Rotary(D))
    assert error(out[0], expected(sinks, window, positions, heads, kv_heads, T)) < TOLERANCE


@pytest.mark.parametrize("start", [2**31, 2**32 - 170, 10**12 % 2**32])
@pytest.mark.parametrize("chunks", [(1,), (7, 33)])
@pytest.mark.parametrize("positions,sinks", [("cache", 0), ("cache", 4), ("absolute", 4)])
def test_far_from_the_start_the_numbers_are_the_same(start, sinks, chunks, positions):
    q, k, v = inputs(340, 6, 2)
    policy = SinkRing(sinks, 30, positions)
    out, _ = streamed(policy, q, k, v, chunks, Rotary(D), start)
    assert error(out[0], expected(sinks, 30, positions, 6, 2, 340)) < TOLERANCE


def test_a_full_ring_does_not_care_how_long_ago_the_sinks_were():
    """The state of a stream at token 2³¹ + 100, made from one at token 100: only the position of
    the window moves, and with positions in the cache that changes nothing."""
    q, k, v = inputs(340, 6, 2)
    policy = SinkRing(4, 30)
    _, cache = streamed(policy, *(x[:, :100] for x in (q, k, v)), (25,), Rotary(D))
    rest = [x[:, 100:200] for x in (q, k, v)]
    out = {}
    for shift in (0, 2**31, 2**32 - 150):
        at = cache.clock.position + jnp.uint32(shift)
        # Keys of the window are stored rotated: shift them by as much, in float64.
        theta = np.round(oracle.frequencies(D, 10_000.0) / (2 * np.pi) * 2**32) * 2 * np.pi / 2**32
        turn = np.full(cache.ring.k.shape[:-1], shift % 2**32, np.float64)
        moved = oracle.rotate(np.asarray(cache.ring.k, np.float64), turn, theta).astype(np.float32)
        moved[:, :, :4] = cache.ring.k[:, :, :4]
        far = dataclasses.replace(
            cache,
            ring=cache.ring._replace(k=jnp.asarray(moved)),
            clock=dataclasses.replace(cache.clock, position=at),
        )
        ys = []
        for t in range(100):
            y, far = attend(far, *(x[:, t : t + 1] for x in rest), None, Rotary(D))
            ys.append(np.asarray(y[0]))
        out[shift] = np.concatenate(ys)
    whole = expected(4, 30, "cache", 6, 2, 340)[100:200]
    for shift, y in out.items():
        assert error(y, whole) < TOLERANCE, shift


@pytest.mark.parametrize("policy", [SinkRing(0, 20), SinkRing(4, 20), FullCache(400)])
def test_rows_of_different_length_are_rows_by_themselves(policy):
    """Each row gets chunks with ragged ends, some empty; padding is junk that nobody may see."""
    rng = np.random.default_rng(3)
    T, B = 130, 4
    q, k, v = inputs(T, 6, 2, B, seed=5)
    done = np.zeros(B, int)
    got = np.zeros_like(q)
    cache = policy.init(batch=B, kv_heads=2, head_dim=D)
    while (done < T).any():
        lengths = np.minimum(rng.choice([0, 1, 3, 9, 16], B), T - done).astype(np.int32)
        parts = []
        for x in (q, k, v):
            part = np.full((B, 16, *x.shape[2:]), 1e4, np.float32)
            for b, n in enumerate(lengths):
                part[b, :n] = x[b, done[b] : done[b] + n]
            parts.append(part)
        y, cache = attend(cache, *parts, lengths, Rotary(D))
        assert np.isfinite(y).all()
        for b, n in enumerate(lengths):
            got[b, done[b] : done[b] + n] = y[b, :n]
        done += lengths
    ring = isinstance(policy, SinkRing)
    for b in range(B):
        want = oracle.attention(
            q[b],
            k[b],
            v[b],
            sinks=policy.sinks if ring else 0,
            window=policy.window if ring else None,
            positions="cache",
            theta=oracle.frequencies(D, 10_000.0),
        )
        assert error(got[b], want) < TOLERANCE


def test_rows_of_different_length_decode_token_by_token():
    policy, T = SinkRing(2, 12), 60
    q, k, v = inputs(T, 4, 2, 3, seed=6)
    cache = policy.init(batch=3, kv_heads=2, head_dim=D)
    heads_start = np.array([1, 9, 17], np.int32)
    first = [x[:, :17] for x in (q, k, v)]
    _, cache = attend(cache, *first, heads_start, Rotary(D))
    for t in range(30):
        parts = [
            np.stack([x[b, n + t : n + t + 1] for b, n in enumerate(heads_start)])
            for x in (q, k, v)
        ]
        y, cache = attend(cache, *parts, None, Rotary(D))
        for b, n in enumerate(heads_start):
            want = oracle.attention(
                *(x[b, : n + t + 1] for x in (q, k, v)),
                sinks=2,
                window=12,
                positions="cache",
                theta=oracle.frequencies(D, 10_000.0),
            )[-1]
            assert error(np.asarray(y[b, 0]), want) < TOLERANCE


@pytest.mark.parametrize("chunks", [(1,), (7,), (128,)])
def test_full_cache_is_dense_attention(chunks):
    q, k, v = inputs(340, 6, 2)
    out, _ = streamed(FullCache(340), q, k, v, chunks, Rotary(D))
    assert error(out[0], expected(0, None, "absolute", 6, 2, 340)) < TOLERANCE


def test_without_positions():
    q, k, v = inputs(80, 6, 2)
    out, _ = streamed(SinkRing(3, 10), q, k, v, (4,), None)
    want = oracle.attention(q[0], k[0], v[0], sinks=3, window=10, positions="cache", theta=None)
    assert error(out[0], want) < TOLERANCE


def test_the_ring_holds_the_first_and_the_newest_tokens():
    q, k, v = inputs(50, 2, 2)
    _, cache = streamed(SinkRing(2, 7), q, k, v, (3,), None)
    tokens = [0, 1, *(max(t for t in range(50) if (t - 2) % 7 == r and t >= 2) for r in range(7))]
    assert (np.asarray(cache.ring.v)[0] == v[0, tokens].transpose(1, 0, 2)).all()
    assert sorted(tokens) == [0, 1, *range(43, 50)]


@pytest.mark.parametrize(("kv_dtype", "turn"), [(None, 30), ("int4", 15)])
def test_nothing_in_the_clock_overflows(kv_dtype, turn):
    """A million tokens later the counters are where the fold puts them: small for ever."""
    policy = SinkRing(4, 30, kv_dtype=kv_dtype)
    cache = policy.init(batch=1, kv_heads=1, head_dim=2)
    zeros = jnp.zeros((1, 1000, 1, 2))

    @jax.jit
    def many(cache):
        return jax.lax.fori_loop(
            0, 1000, lambda _, c: c.attend(zeros, zeros, zeros, None)[1], cache
        )

    cache = many(cache)
    assert int(cache.clock.position[0]) == 10**6
    assert int(cache.clock.ticks[0]) == 34 + (10**6 - 34) % turn


def test_bfloat16_keeps_its_dtype():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(60, 6, 2))
    out, cache = streamed(SinkRing(4, 16), q, k, v, (5,), Rotary(D), dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16 and cache.ring.k.dtype == jnp.bfloat16
    want = oracle.attention(
        *(np.asarray(x[0], np.float32) for x in (q, k, v)),
        sinks=4,
        window=16,
        positions="cache",
        theta=oracle.frequencies(D, 10_000.0),
    )
    # Keys of size 4 rounded to 8 bits of mantissa: scores are off by some 2⁻⁷.
    assert error(out[0].astype(np.float32), want) < 0.03


@pytest.mark.parametrize("policy", [SinkRing(4, 60), FullCache(64)])
@pytest.mark.parametrize("batch,tokens", [(1, 1), (3, 1), (2, 16)])
def test_the_cache_is_updated_in_place(policy, batch, tokens):
    cache = policy.init(batch=batch, kv_heads=2, head_dim=D)
    parts = [jnp.zeros((batch, tokens, h, D)) for h in (6, 2, 2)]
    lengths = None if tokens == 1 else jnp.full(batch, tokens, jnp.int32)
    step = jax.jit(lambda c, *a: c.attend(*a, Rotary(D), lengths), donate_argnums=0)
    memory = step.lower(cache, *parts).compile().memory_analysis()
    bytes_of_cache = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == bytes_of_cache
    if tokens == 1:
        assert memory.temp_size_in_bytes < bytes_of_cache / 2


def test_a_full_cache_that_is_full_says_so():
    q, k, v = (jnp.asarray(x) for x in inputs(10, 2, 2))
    cache = FullCache(8).init(batch=1, kv_heads=2, head_dim=D)
    with pytest.raises(CacheFull, match="FullCache of 8 tokens is full: a row would hold 10"):
        cache.attend(q, k, v, None)
    out, _ = attend(cache, q, k, v, None, None)
    assert np.isnan(out).all()  # inside jit nothing can be raised, but nobody takes it for real


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: SinkRing(-1, 8), "sinks must be ≥ 0, got -1"),
        (lambda: SinkRing(4, 0), "window must be ≥ 1, got 0"),
        (lambda: SinkRing(4, -3), "window must be ≥ 1, got -3"),
        (lambda: SinkRing(4, 8, "relative"), "positions must be .* got 'relative'"),
        (lambda: SinkRing(4, 8, kv_dtype="int2"), "kv_dtype must be one of .* got 'int2'"),
        (lambda: FullCache(0), "capacity must be ≥ 1, got 0"),
        (lambda: SinkRing(4, 8).init(batch=0, kv_heads=1, head_dim=2), "batch ≥ 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policy", [SinkRing(4, 20), FullCache(64)])
@pytest.mark.parametrize("T", [1, 7])
def test_a_backend_named_serves_chunks_and_single_tokens(policy, T):
    q, k, v = (x[:, :T] for x in inputs(64, 4, 2))
    cache = policy.init(batch=1, kv_heads=2, head_dim=D)
    plain, _ = cache.attend(q, k, v, None, backend="reference")
    blocks, _ = cache.attend(q, k, v, None, backend="xla")
    assert error(np.asarray(blocks), np.asarray(plain)) <= TOLERANCE


@pytest.mark.parametrize("policy", [SinkRing(4, 20), FullCache(64)])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4"])
def test_quantised_caches_give_the_same_in_any_chunks(policy, kv_dtype):
    """What a token sees of the others is what the cache keeps of them, in a chunk as alone."""
    q, k, v = inputs(64, 4, 2)
    policy = dataclasses.replace(policy, kv_dtype=kv_dtype)
    one, cache = streamed(policy, q, k, v, (1,), Rotary(D))
    assert cache.ring.k.dtype == kv_dtype
    for chunks in ((7,), (40,)):
        some, after = streamed(policy, q, k, v, chunks, Rotary(D))
        # The tokens' rotations differ in their last bit, by which a number may fall to the next
        # step of the grid: rarely, so the mean is what is held.
        assert np.abs(some - one).mean() <= 1e-4 * np.abs(one).max()
        assert np.mean(np.asarray(after.ring.k != cache.ring.k)) <= 1e-3
    exact, _ = streamed(dataclasses.replace(policy, kv_dtype=None), q, k, v, (1,), Rotary(D))
    # Half a step of each grid, of keys and of values, on outputs of random inputs.
    bound = {"bfloat16": 0.02, "int8": 0.03, "int4": 0.4}[kv_dtype]
    assert 0 < error(one, exact) <= bound


def eighths(shape, rng):
    """Numbers whose channels can be mixed without rounding."""
    return (rng.integers(-16, 17, shape) / 8).astype(np.float32)


def in_four_bits(x):
    mix = hadamard(D) / D**0.5
    whole, scale = quantised(jnp.asarray(x @ mix, jnp.float32), "int4")
    return np.asarray(whole, np.float64) * np.asarray(scale, np.float64)[..., None] @ mix


@pytest.mark.parametrize("chunks", [(1,), (7, 1), (150,)], ids=str)
@pytest.mark.parametrize(
    ("policy", "late", "scores"),
    [
        (SinkRing(3, 70, kv_dtype="int4"), 32, Scores()),
        (SinkRing(3, 70, kv_dtype="int4"), 32, Scores(alibi_slopes=np.float32([0.5, 0.01] * 2))),
        (SinkRing(0, 11, "absolute", "int4"), 5, Scores(soft_cap=2.0, scale=0.5)),
        (SinkRing(5, 1, kv_dtype="int4"), 0, Scores()),
        (FullCache(150, "int4"), 32, Scores(sink_logits=np.float32([0.3, -1, 2, 0]))),
    ],
    ids=str,
)
def test_in_four_bits_the_newest_tokens_are_as_they_were(policy, late, scores, chunks):
    """In chunks of any length, two rows, of which one takes in more tokens at a time."""
    rng = np.random.default_rng(3)
    q, k, v = (eighths((2, 150, h, D), rng) for h in (4, 2, 2))
    cache = policy.init(batch=2, kv_heads=2, head_dim=D)
    attend = jax.jit(
        lambda cache, q, k, v, lengths: cache.attend(q, k, v, None, lengths, scores=scores)
    )
    sinks, window = getattr(policy, "sinks", 0), getattr(policy, "window", None)
    settings = scores._asdict() | dict(sinks=sinks, window=window, positions="cache", theta=None)
    expected = [
        oracle.attention(*row, **settings, late=(late, *map(in_four_bits, row[1:])))
        for row in zip(q, k, v, strict=True)
    ]
    at, i = np.zeros(2, int), 0
    while (at < 150).any():
        size = chunks[i % len(chunks)]
        some = np.minimum(150 - at, [size, size - size // 3])
        taken = np.minimum(at[:, None] + np.arange(size), 149)[..., None, None]
        chunk = [np.take_along_axis(x, taken, axis=1) for x in (q, k, v)]
        together = size == 1 and (some == 1).all()
        out, cache = attend(cache, *chunk, None if together else jnp.asarray(some, jnp.int32))
        for row in range(2):
            got, want = out[row, : some[row]], expected[row][at[row] : at[row] + some[row]]
            assert np.abs(got - want).max(initial=0) < 1e-5 * np.abs(expected[row]).max()
        at, i = at + some, i + 1


def test_what_waits_to_be_rounded_is_not_kept_twice():
    cache = SinkRing(4, 1020, kv_dtype="int4").init(batch=1, kv_heads=2, head_dim=D)
    assert (cache.ring.k.shape[2], cache.recent.k.shape[2]) == (4 + 1020 - 32, 32)
    for kv_dtype in (None, "int8"):
        assert (
            SinkRing(4, 9, kv_dtype=kv_dtype).init(batch=1, kv_heads=1, head_dim=D).recent is None
        )


@pytest.mark.parametrize(("kv_dtype", "largest"), [("int8", 127), ("int4", 7)])
def test_channels_far_larger_than_others_cost_little(kv_dtype, largest):
    """Against keys and values that are rounded as they are, by one scale a token and head."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 64, h, 64)) for h in (4, 2, 2))
    k[..., 3] += 20
    k[..., 40] *= 10
    v[..., 7] *= 10

    def rounded(x):
        scale = np.abs(x).max(axis=-1, keepdims=True) / largest
        return np.round(x / scale) * scale

    exact, plain = (
        oracle.attention(
            q[0], key[0], value[0], sinks=0, window=64, positions="absolute", theta=None
        )
        for key, value in ((k, v), (rounded(k), rounded(v)))
    )
    cache = SinkRing(0, 64, kv_dtype=kv_dtype).init(batch=1, kv_heads=2, head_dim=64)
    out, _ = cache.attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), None)
    assert np.abs(out[0] - exact).mean() < np.abs(plain - exact).mean() / 2


@pytest.mark.parametrize("device", ["cpu", "v5e"])
@pytest.mark.parametrize(
    "policy",
    [
        FullCache(1 << 16, "int8"),
        FullCache(1 << 16, "bfloat16"),
        SinkRing(4, (1 << 16) - 4, kv_dtype="int8"),
    ],
)
def test_prefill_makes_no_dense_copy(device, policy):
    """A chunk over a long cache, in float32: the cache is updated in place, and temporaries are
    those of the chunk: a copy of the keys alone, not even dequantised, would be half of the cache.
    """
    B, T, H, Hkv, head_dim = 1, 64, 4, 2, 64
    sharding = None if device == "cpu" else targets.sharding(device)
    backend = "xla" if device == "cpu" else "tpu"

    def shaped(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = jax.eval_shape(lambda: policy.init(batch=B, kv_heads=Hkv, head_dim=head_dim))
    cache = jax.tree.map(lambda a: shaped(*a.shape, dtype=a.dtype), cache)
    args = [shaped(B, T, h, head_dim) for h in (H, Hkv, Hkv)] + [shaped(B, dtype="int32")]

    def step(cache, q, k, v, lengths):
        return cache.attend(q, k, v, Rotary(head_dim), lengths, backend=backend)

    memory = jax.jit(step, donate_argnums=0).lower(cache, *args).compile().memory_analysis()
    kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.ring))
    assert memory.alias_size_in_bytes >= kept
    assert memory.temp_size_in_bytes < kept / 8


def test_heads_that_do_not_divide_are_refused():
    cache = SinkRing(4, 8).init(batch=1, kv_heads=2, head_dim=D)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        cache.attend(jnp.zeros((1, 1, 3, D)), *[jnp.zeros((1, 1, 2, D))] * 2, None)
