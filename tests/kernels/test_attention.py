"""The plain forms of the ops against their definition in float64, token by token, and their
gradients against finite differences of that definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.flash.rule import ring_ticks, slot_of
from pallas_kernels.ring import Ring, empty_ring, quantised, stored, write
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sink_attention import sink_attention

# Float32 against float64, scores up to 10: sums of 64 products and exp give some 2e-6.
TOLERANCE = 1e-5
PLAIN = ("reference", "xla")


def definition(q, k, v, seen, *, q_sinks, is_sink, distance, slopes, soft_cap, sink_logits, scale):
    """Attention in float64. q `[T, H, D]`, k and v `[K, Hkv, D]`, the masks `[T, K]`. Returns the
    output `[T, H, D]` and the log-sum-exp `[T, H]`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    T, H, D = q.shape
    out, lse = np.zeros((T, H, D)), np.full((T, H), -np.inf)
    for t in range(T):
        for h in range(H):
            keys, values = k[:, h // (H // k.shape[1])], v[:, h // (H // k.shape[1])]
            scores = keys @ q[t, h]
            if q_sinks is not None:
                scores = np.where(is_sink[t], keys @ np.float64(q_sinks[t, h]), scores)
            scores = scores * scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if slopes is not None:
                scores = scores - slopes[h] * distance[t]
            scores = scores[seen[t]]
            logits = scores if sink_logits is None else np.append(scores, sink_logits[h])
            if len(logits):
                lse[t, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                out[t, h] = np.exp(scores - lse[t, h]) @ values[seen[t]]
    return out, lse


@dataclasses.dataclass(frozen=True)
class Case:
    """A drawn call: `before` tokens in the ring, then a chunk of `T`."""

    T: int
    before: int
    sinks: int
    window: int | None
    heads: int
    kv_heads: int
    D: int
    rotated: bool
    alibi: bool
    soft_cap: float | None
    logits: bool
    segments: tuple[int, ...]
    seed: int

    def arrays(self) -> dict[str, np.ndarray | None]:
        rng = np.random.default_rng(self.seed)
        N = self.before + self.T

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        return dict(
            q=normal(self.T, self.heads, self.D),
            k=normal(N, self.kv_heads, self.D),
            v=normal(N, self.kv_heads, self.D),
            q_sinks=normal(self.T, self.heads, self.D) if self.rotated else None,
            sink_logits=normal(self.heads) if self.logits else None,
            slopes=np.abs(normal(self.heads)) if self.alibi else None,
        )

    def masks(self) -> dict[str, np.ndarray]:
        N = self.before + self.T
        ends = np.cumsum(self.segments) if self.segments else np.asarray([N])
        segment = np.searchsorted(ends, np.arange(N), side="right")
        start = np.concatenate([[0], ends])[segment]
        t = np.arange(self.before, N)[:, None]
        i = np.arange(N)
        is_sink = i - start[i] < self.sinks
        seen = (segment[t] == segment[i]) & (i <= t)
        far = t - i
        if self.window is not None:
            seen = seen & (is_sink | (t - i < self.window))
            place = np.minimum(t - start[t], self.sinks + self.window - 1)
            far = np.where(is_sink, place - (i - start[i]), t - i)
        return dict(seen=seen, is_sink=np.broadcast_to(is_sink, seen.shape), distance=far)

    def exact(self, a):
        rest = {n: a[n] for n in ("q_sinks", "slopes", "sink_logits")}
        return definition(
            a["q"],
            a["k"],
            a["v"],
            **self.masks(),
            **rest,
            soft_cap=self.soft_cap,
            scale=self.D**-0.5,
        )

    def ring(self, a, folds: int = 0, dtype="float32"):
        """The ring that holds the tokens before the chunk, and its ticks."""
        if not self.before:
            return None, None
        S, W = self.sinks, self.window
        ring = [np.full((1, self.kv_heads, S + W, self.D), 7.0, np.float32) for _ in "kv"]
        for t in range(self.before):
            for side, name in zip(ring, "kv", strict=True):
                side[0, :, int(slot_of(t, S, W))] = a[name][t]
        tick = self.before
        if tick >= S + W:
            tick = S + W + (tick - S) % W if folds else tick
        return stored(*map(jnp.asarray, ring), dtype), jnp.asarray([tick], jnp.int32)

    def run(self, a, backend, dtype="float32", **options):
        ring, ticks = self.ring(a, folds=self.seed % 2, dtype=dtype)
        ids = None
        if self.segments:
            ids = np.repeat(np.arange(len(self.segments)), self.segments)[None]

        def call(x):
            return sink_attention(
                x["q"][None],
                x["k"][None, self.before :],
                x["v"][None, self.before :],
                sinks=self.sinks,
                window=self.window,
                q_sinks=None if x["q_sinks"] is None else x["q_sinks"][None],
                ring=x["ring"],
                ticks=ticks,
                segment_ids=ids,
                sink_logits=x["sink_logits"],
                alibi_slopes=x["slopes"],
                soft_cap=self.soft_cap,
                return_lse=True,
                backend=backend,
                block_sizes=(8, 16),
                **options,
            )

        x = {n: None if b is None else jnp.asarray(b) for n, b in a.items()}
        return call, x | dict(ring=ring)


@st.composite
def cases(draw, *, max_tokens: int = 40):
    kv_heads = draw(st.sampled_from([1, 2]))
    window = draw(st.sampled_from([None, 1, 3, 9, 33]))
    packed = draw(st.booleans())
    T = draw(st.integers(1, max_tokens))
    before = 0 if packed or window is None else draw(st.integers(0, 80))
    segments = ()
    if packed:
        cut = draw(st.integers(0, T))
        segments = tuple(n for n in (cut, T - cut) if n)
    return Case(
        T=T,
        before=before,
        sinks=draw(st.sampled_from([0, 1, 4])),
        window=window,
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        D=draw(st.sampled_from([8, 16])),
        rotated=draw(st.booleans()),
        alibi=draw(st.booleans()),
        soft_cap=draw(st.sampled_from([None, 2.0])),
        logits=draw(st.booleans()),
        segments=segments,
        seed=draw(st.integers(0, 1000)),
    )


def close(got, expected, tolerance=TOLERANCE):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    assert np.array_equal(finite, np.isfinite(got))
    scale = np.abs(expected[finite]).max(initial=1.0)
    assert np.abs(got[finite] - expected[finite]).max(initial=0.0) <= tolerance * scale


@pytest.mark.parametrize("backend", PLAIN)
@settings(max_examples=9, deadline=None, derandomize=True)
@given(case=cases())
def test_attention_is_its_definition(backend, case):
    a = case.arrays()
    call, x = case.run(a, backend)
    out, lse = call(x)
    exact_out, exact_lse = case.exact(a)
    close(out[0], exact_out)
    close(lse[0], exact_lse)


@pytest.mark.parametrize("backend", PLAIN)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(case=cases(max_tokens=20))
def test_gradients_are_finite_differences(backend, case):
    a = case.arrays()
    call, x = case.run(a, backend)
    rng = np.random.default_rng(case.seed + 1)
    _, some = case.exact(a)
    weights = rng.standard_normal((case.T, case.heads, case.D))
    weights_lse = np.where(np.isfinite(some), rng.standard_normal((case.T, case.heads)), 0.0)

    def loss(out, lse, xp):
        lse = xp.where(xp.asarray(weights_lse != 0), lse, 0.0)
        return xp.sum(out * weights) + xp.sum(lse * weights_lse)

    grads = jax.grad(lambda x: loss(*(y[0] for y in call(x)), jnp), allow_int=True)(x)
    step = 1e-5
    for name in ("q", "k", "v", "q_sinks", "sink_logits"):
        if a[name] is None:
            continue
        direction = rng.standard_normal(a[name].shape)
        if name in "kv":
            direction[: case.before] = 0  # those are in the ring
        up, down = (
            loss(*case.exact({**a, name: a[name] + sign * step * direction}), np)
            for sign in (1, -1)
        )
        got = np.sum(np.asarray(grads[name], np.float64) * direction)
        # Float32 gradients, summed over a few thousand products of order 1.
        assert got == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-3)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(case=cases(max_tokens=20).filter(lambda c: c.before))
def test_gradients_reach_the_ring_alike(case):
    a = case.arrays()
    results = []
    for backend in PLAIN:
        call, x = case.run(a, backend)
        grads = jax.grad(lambda x, call=call: jnp.sum(jnp.sin(call(x)[0])))(x)
        results.append(grads)
    got, expected = ((r["q"], *r["ring"][:2]) for r in (results[1], results[0]))
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("backend", PLAIN)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(case=cases(max_tokens=20).filter(lambda c: c.before))
def test_rings_of_any_dtype_are_attended_to_as_they_are(backend, dtype, case):
    """The definition is given the stored numbers: what is left is the rounding of float32."""
    a = case.arrays()
    call, x = case.run(a, backend, dtype)
    out, lse = call(x)
    for name in "kv":
        whole, scale = quantised(jnp.asarray(a[name][: case.before]), dtype)
        held = np.asarray(whole.astype(jnp.float32), np.float64)
        held *= 1 if scale is None else np.asarray(scale, np.float64)[..., None]
        a[name] = np.concatenate([held, a[name][case.before :]])
    exact_out, exact_lse = case.exact(a)
    close(out[0], exact_out)
    close(lse[0], exact_lse)


def test_what_nobody_sees_is_not_dequantised():
    """A scale of NaN spoils every block that is read."""
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8))
    ring = stored(jnp.ones((1, 1, 64, 8)), jnp.ones((1, 1, 64, 8)), jnp.int8)
    poison = jnp.where(jnp.arange(64) < 32, 1.0, jnp.nan)
    ring = ring._replace(k_scale=ring.k_scale * poison, v_scale=ring.v_scale * poison)

    def call(ticks):
        return sink_attention(
            q, k, k, ring=ring, ticks=ticks, window=64, backend="xla", block_sizes=(8, 16)
        )

    assert np.isfinite(call(jnp.asarray([20]))).all()
    assert not np.isfinite(call(jnp.asarray([40]))).all()


@pytest.mark.parametrize("backend", PLAIN)
def test_a_quantised_ring_has_no_gradients(backend):
    ring = empty_ring(1, 2, 8, 8, jnp.int8)

    def loss(q):
        return attention(q=q, ring=ring, ticks=jnp.zeros(1, int), window=8, backend=backend).sum()

    with pytest.raises(ValueError, match="no gradients with a ring of int8"):
        jax.grad(loss)(jnp.ones((1, 4, 6, 8)))


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(("none", "alibi"), [(0, False), (5, True), (30, False)])
def test_queries_may_come_after_the_first_keys(backend, none, alibi):
    """The last 20 of 43 tokens; of the tokens, the first few are none."""
    case = Case(43 - none, 0, 2, 9, 4, 2, 8, False, alibi, None, False, (), 0)
    a = case.arrays()
    q, k, v = (np.pad(a[n], [(none, 0), (0, 0), (0, 0)], constant_values=3.0)[None] for n in "qkv")
    out, lse = sink_attention(
        q[:, 23:],
        k,
        v,
        sinks=2,
        window=9,
        ticks=jnp.asarray([-none], jnp.int32),
        alibi_slopes=a["slopes"],
        return_lse=True,
        backend=backend,
        block_sizes=(8, 16),
    )
    exact_out, exact_lse = case.exact(a)
    seen = min(20, 43 - none)
    close(out[0, 20 - seen :], exact_out[-seen:])
    close(lse[0, 20 - seen :], exact_lse[-seen:])
    assert np.all(np.asarray(out[0, : 20 - seen]) == 0)
    assert np.all(np.asarray(lse[0, : 20 - seen]) == -np.inf)


def test_a_query_that_sees_nothing_gives_zeros_and_passes_nothing_on():
    q, k, v = (jnp.ones((1, 8, 1, 8)) for _ in range(3))
    blocks = jnp.full((1, 1, 2, 1), -1)

    def call(backend, q, k, v):
        return block_sparse_attention(
            q, k, v, blocks, block_sizes=(4, 4), return_lse=True, backend=backend
        )

    for backend in PLAIN:
        out, lse = call(backend, q, k, v)
        assert np.all(np.asarray(out) == 0) and np.all(np.asarray(lse) == -np.inf)
        grads = jax.grad(lambda *x, b=backend: call(b, *x)[0].sum(), argnums=(0, 1, 2))(q, k, v)
        assert all(np.all(np.asarray(g) == 0) for g in grads)


@pytest.mark.parametrize("backend", PLAIN)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 30),
    extra=st.integers(0, 20),
    lists=st.sampled_from([1, 2, 6]),
    seed=st.integers(0, 1000),
)
def test_block_sparse_is_its_definition(backend, T, extra, lists, seed):
    rng = np.random.default_rng(seed)
    K, H, Hkv, D, bq, bk = T + extra, 6, 2, 8, 4, 8
    q, k, v = (
        rng.standard_normal((1, n, h, D)).astype(np.float32)
        for n, h in ((T, H), (K, Hkv), (K, Hkv))
    )
    Nq, Nk = -(-T // bq), -(-K // bk)
    blocks = rng.integers(-1, Nk, (1, lists, Nq, 3))
    out, lse = block_sparse_attention(
        q, k, v, blocks, block_sizes=(bq, bk), return_lse=True, backend=backend
    )
    for h in range(H):
        listed = blocks[0, h // (H // lists)]
        seen = np.zeros((T, K), bool)
        for t in range(T):
            for i in range(t + K - T + 1):
                seen[t, i] = i // bk in listed[t // bq]
        none = dict.fromkeys(("q_sinks", "slopes", "soft_cap", "sink_logits", "is_sink"))
        exact = definition(
            q[0, :, h : h + 1],
            k[0, :, [h // 3]].transpose(1, 0, 2),
            v[0, :, [h // 3]].transpose(1, 0, 2),
            seen,
            distance=None,
            scale=D**-0.5,
            **none,
        )
        close(out[0, :, h], exact[0][:, 0])
        close(lse[0, :, h], exact[1][:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    sinks=st.sampled_from([0, 1, 4]),
    window=st.sampled_from([5, 9]),
    T=st.sampled_from([1, 1, 3]),
    start=st.integers(0, 30),
    soft_cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000),
)
def test_ring_decode_is_its_definition(dtype, sinks, window, T, start, soft_cap, seed):
    """What the ring holds is what is attended to: the definition is given the stored numbers."""
    rng = np.random.default_rng(seed)
    H, Hkv, D, total = 6, 2, 8, start + T

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    k, v = normal(total, Hkv, D), normal(total, Hkv, D)
    q, q_sinks, logits = normal(T, H, D), normal(T, H, D), normal(H)
    slopes = np.abs(normal(H))
    ring = empty_ring(1, Hkv, sinks + window, D, dtype)
    stored = []
    for x in (k, v):
        whole, scale = quantised(jnp.asarray(x), dtype)
        stored.append((whole, scale))
        if scale is not None:
            largest, step = {"int8": 127, "int4": 7}[dtype], np.asarray(scale)[..., None]
            error = np.abs(np.asarray(whole, np.float32) * step - x)
            # A half step of the grid, and of float32's rounding; of four bits what lies far out
            # may be cut off, where all together is nearer for it.
            assert np.all((error <= 0.501 * step) | (np.abs(x) > largest * step))
            widest = np.abs(x).max(axis=-1, keepdims=True) / largest
            plain = np.rint(x / widest) * widest - x
            assert np.all((error**2).sum(-1) <= 1.0001 * (plain**2).sum(-1))
    (k8, k_scale), (v8, v_scale) = stored
    for t in range(start):
        slot = slot_of(jnp.asarray([[t]]), sinks, window)
        at = [x if x is None else x[t][None, :, None] for x in (k8, v8, k_scale, v_scale)]
        ring = Ring(
            *(None if x is None else write(b, x, slot) for b, x in zip(ring, at, strict=True))
        )
    out, after, lse = ring_decode(
        q[None],
        k[None, start:],
        v[None, start:],
        ring,
        jnp.asarray([start], jnp.int32),
        sinks=sinks,
        window=window,
        q_sinks=q_sinks[None],
        sink_logits=jnp.asarray(logits),
        alibi_slopes=jnp.asarray(slopes),
        soft_cap=soft_cap,
        return_lse=True,
        backend="reference",
    )

    def floats(whole, scale):
        whole = np.asarray(whole.astype(jnp.float32), np.float64)
        return whole if scale is None else whole * np.asarray(scale, np.float64)[..., None]

    case = Case(T, start, sinks, window, H, Hkv, D, True, True, soft_cap, True, (), 0)
    exact_out, exact_lse = case.exact(
        dict(
            q=q,
            k=floats(k8, k_scale),
            v=floats(v8, v_scale),
            q_sinks=q_sinks,
            sink_logits=logits,
            slopes=slopes,
        )
    )
    # With several tokens a bfloat16 ring is multiplied in bfloat16: the weights' 8 bits.
    tolerance = 1e-2 if dtype == "bfloat16" and T > 1 else TOLERANCE
    close(out[0], exact_out, tolerance)
    close(lse[0], exact_lse, tolerance)
    held = np.asarray(ring_ticks(jnp.asarray([total]), sinks, window))[0]
    for slot, tick in enumerate(held):
        if tick >= 0:
            assert np.array_equal(after.k[0, :, slot], k8[tick])
            assert np.array_equal(after.v[0, :, slot], v8[tick])
    folded = sinks + window + (start - sinks) % window
    if start >= sinks + window:
        again, _ = ring_decode(
            q[None],
            k[None, start:],
            v[None, start:],
            ring,
            jnp.asarray([folded], jnp.int32),
            sinks=sinks,
            window=window,
            q_sinks=q_sinks[None],
            sink_logits=jnp.asarray(logits),
            alibi_slopes=jnp.asarray(slopes),
            soft_cap=soft_cap,
        )
        assert np.array_equal(again, out)


def attention(**options):
    q = jnp.zeros((1, 4, 6, 8))
    kv = jnp.zeros((1, 4, 2, 8))
    arguments: dict = dict(q=q, k=kv, v=kv) | options
    return sink_attention(**arguments)


def decode(T=1, D=8, **options):
    arguments = dict(ring=empty_ring(1, 2, 12, D, jnp.float32), ticks=jnp.zeros(1, jnp.int32))
    arguments |= dict(sinks=4, window=8) | options
    q, kv = jnp.zeros((1, T, 6, D)), jnp.zeros((1, T, 2, D))
    return ring_decode(q, kv, kv, arguments.pop("ring"), arguments.pop("ticks"), **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(window=0), "window must be ≥ 1 or None, got 0"),
        (lambda: attention(sinks=-1), "sinks must be ≥ 0, got -1"),
        (lambda: attention(k=jnp.zeros((1, 4, 4, 8))), r"\(1, 4, 6, 8\) do not fit keys"),
        (lambda: attention(q_sinks=jnp.zeros((1, 4, 6, 4))), r"q_sinks \(1, 4, 6, 4\)"),
        (lambda: attention(sink_logits=jnp.zeros(2)), r"sink_logits \(2,\) must be \[H\]"),
        (lambda: attention(ring=empty_ring(1, 2, 9, 8), window=9), "a ring needs ticks"),
        (lambda: attention(q=jnp.zeros((1, 5, 6, 8))), "5 queries need as many keys at least"),
        (lambda: attention(segment_ids=jnp.zeros((1, 3), int)), r"segment_ids \(1, 3\)"),
        (lambda: attention(backend="cuda"), "has the backends tpu, gpu, xla, reference"),
        (
            lambda: attention(ring=empty_ring(1, 2, 9, 8), ticks=jnp.zeros(1, int), window=8),
            r"must be \[B, Hkv, sinks \+ window, D\] = \(1, 2, 8, 8\)",
        ),
        (
            lambda: attention(
                ring=empty_ring(1, 2, 8, 8, jnp.int8)._replace(v_scale=None),
                ticks=jnp.zeros(1, int),
                window=8,
            ),
            r"a ring of int8 needs v_scale \(1, 2, 8\), got None",
        ),
        (lambda: decode(T=9), "window 8 is shorter than the 9 new tokens"),
        (lambda: decode(ticks=jnp.zeros(2, int)), r"ticks \(2,\) must be \[B\]"),
        (
            lambda: decode(ring=empty_ring(1, 2, 12, 8, jnp.int8)._replace(k_scale=None)),
            r"a ring of int8 needs k_scale \(1, 2, 12\), got None",
        ),
        (lambda: empty_ring(1, 2, 12, 7, jnp.int4), "int4 needs an even head_dim"),
        (lambda: empty_ring(1, 2, 12, 8, jnp.int32), "a ring holds floats, int8 or int4"),
        (lambda: decode(backend="tpu"), "backend 'tpu' can't serve this call: .*head_dim 8"),
        (lambda: attention(backend="tpu"), "backend 'tpu' can't serve this call: .*head_dim 8"),
        (lambda: attention(backend="gpu"), "backend 'gpu' can't serve this call: .*"),
        (
            lambda: decode(D=64, ring=empty_ring(1, 2, 12, 64, jnp.float32), backend="tpu"),
            "ring_decode: backend 'tpu' can't serve this call: the arrays are on cpu",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
