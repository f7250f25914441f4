"""HeadSplit against the caches that it is made of, and against the definition in float64."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import LanguageModel, nll
from sinkjax.caches import (
    CacheFull,
    FullCache,
    HeadSplit,
    LayerCaches,
    PerLayer,
    SinkRing,
    parse_policy,
    read_gates,
    retrieval_heads,
    without_end,
    write_gates,
)
from sinkjax.caches.heads import SplitHeads
from sinkjax.models import Config, Decoder, Rotary
from sinkjax.models.positions import Alibi
from tests import oracle
from tests.conftest import tiny_decoder
from tests.processes import run_processes

FULL, RING = FullCache(48), SinkRing(2, 9, positions="absolute")
T, H, HKV, D = 48, 8, 4, 16
PATTERN = (True, False, False, True)
# Of the largest output. Float32 gives 1e-6 to 1e-5; the rounding of keys and values is 1/256 of
# each in bfloat16, 1/254 of a token's largest in int8 and 1/14 in int4, in scores up to 5.
BOUNDS = {None: 1e-5, "bfloat16": 2e-2, "int8": 2e-2, "int4": 0.3}


@functools.cache
def inputs():
    rng = np.random.default_rng(1)
    return tuple(rng.standard_normal((2, T, h, D)).astype(np.float32) for h in (H, HKV, HKV))


@functools.cache
def expected() -> np.ndarray:
    rows = []
    for q, k, v in zip(*inputs(), strict=True):
        theta = oracle.frequencies(D, 10_000.0)
        kinds = [
            oracle.attention(q, k, v, sinks=s, window=w, positions="absolute", theta=theta)
            for s, w in ((2, 9), (0, None))
        ]
        which = np.repeat(PATTERN, H // HKV)
        rows.append(np.where(which[:, None], kinds[1], kinds[0]))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("chunks", "kv_dtype"),
    [((1,), None), ((7,), None), ((48,), None), *(((31, 1), kind) for kind in BOUNDS)],
    ids=str,
)
def test_heads_of_both_kinds(chunks, kv_dtype):
    policy = HeadSplit(
        FullCache(48, kv_dtype), SinkRing(2, 9, "absolute", kv_dtype), (PATTERN, PATTERN)
    )
    caches = LayerCaches.init(policy, layers=2, batch=2, kv_heads=HKV, head_dim=D)
    assert len(caches.clocks) == 2  # one a kind, whatever the number of layers

    @jax.jit
    def attend(caches, q, k, v):
        outs = [cache.attend(q, k, v, Rotary(D)) for cache in caches]
        return outs[0][0], LayerCaches.of(cache for _, cache in outs)

    q, k, v = inputs()
    out, t, i = [], 0, 0
    while t < T:
        n = min(chunks[i % len(chunks)], T - t)
        y, caches = attend(caches, *(x[:, t : t + n] for x in (q, k, v)))
        out.append(y)
        t, i = t + n, i + 1
    error = np.abs(np.concatenate(out, axis=1) - expected()).max() / np.abs(expected()).max()
    assert error < BOUNDS[kv_dtype]


@pytest.mark.parametrize("all_of", [True, False])
def test_one_kind_alone_is_that_cache_bit_for_bit(all_of):
    model = tiny_decoder(97)
    policy = HeadSplit(FULL, RING, np.full((2, 2), all_of))
    tokens = jnp.arange(40)[None] % 97

    @functools.partial(jax.jit, static_argnums=0)
    def run(policy, tokens):
        hidden, caches = model(tokens, model.init_caches(policy))
        again, _ = model(tokens[:, :1], caches)
        return hidden, again

    for found, wanted in zip(
        run(policy, tokens), run(FULL if all_of else RING, tokens), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_the_order_of_heads_in_a_pattern_costs_no_gather():
    """Heads of a kind side by side are sliced; only others are put together anew."""
    policy = HeadSplit(FULL, RING, [[True, True, False, False]])
    caches = LayerCaches.init(policy, layers=1, batch=1, kv_heads=4, head_dim=D)
    (cache,) = caches
    q, k, v = (x[:1, :1] for x in inputs())
    text = str(jax.make_jaxpr(lambda c, *x: c.attend(*x, None))(cache, q, k, v))
    assert (
        text.count("concatenate")
        == str(
            jax.make_jaxpr(lambda c, *x: c.retrieval.attend(*x, None))(
                cache, q[:, :, :4], k[:, :, :2], v[:, :, :2]
            )
        ).count("concatenate")
        + str(
            jax.make_jaxpr(lambda c, *x: c.streaming.attend(*x, None))(
                cache, q[:, :, 4:], k[:, :, 2:], v[:, :, 2:]
            )
        ).count("concatenate")
        + 1
    )  # of the two outputs


@pytest.mark.parametrize("switches", [dict(sink_logits=True, qkv_bias=True), dict(alibi=Alibi())])
def test_weights_in_the_order_of_a_pattern_compute_the_same(switches):
    positions = "cache" if "alibi" in switches else "absolute"
    pattern = np.array([[True, False, False, True], [False, True, False, True]])
    policy = HeadSplit(FULL, SinkRing(2, 9, positions), pattern)
    base = tiny_decoder(97).config
    config = dataclasses.replace(base, heads=8, kv_heads=4, **switches)
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=x.shape, scale=0.3) for n, x in Decoder.shapes(config).items()}
    plain, other = (Decoder.from_weights(config, weights) for _ in range(2))
    name = LanguageModel(other).fingerprint()
    grouped = other.grouped(pattern)
    assert LanguageModel(grouped).fingerprint() == name == LanguageModel(plain).fingerprint()
    assert grouped.head_order == ((0, 3, 1, 2), (1, 3, 0, 2))
    for name, x in plain.weights().items():
        np.testing.assert_array_equal(grouped.weights()[name], x, err_msg=name)
    caches = grouped.init_caches(policy)
    assert all(cache.policy.heads == (True, True, False, False) for cache in caches)

    @jax.jit
    def run(model, tokens, caches):
        hidden, caches = model(tokens, caches)
        return model(tokens[:, :1], caches)[0], hidden

    tokens = jnp.arange(40)[None]
    found = run(grouped, tokens, caches)
    wanted = run(plain, tokens, plain.init_caches(policy))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)  # sums over heads in another order


def four_heads() -> tuple[Config, dict[str, np.ndarray], HeadSplit]:
    """A model of 4 KV heads, and a policy that has two heads of each kind in its first layer."""
    config = dataclasses.replace(tiny_decoder(97).config, heads=8, kv_heads=4)
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=x.shape, scale=0.3) for n, x in Decoder.shapes(config).items()}
    pattern = np.array([[True, False, False, True], [True] * 4])
    return config, weights, HeadSplit(FULL, SinkRing(2, 9, "absolute"), pattern)


ON_TWO = """
import json
jax.config.update("jax_disable_most_optimizations", True)
import sinkjax as sj
from tests.caches.test_heads import *

config, weights, policy = four_heads()
two = sj.make_mesh("model=2")
model = Decoder.from_weights(config, weights, mesh=two)
try:
    sj.nll(LanguageModel(model, mesh=two), range(40), cache=policy)
except ValueError as error:
    print(">", error)
try:
    model.grouped(np.array([[True, False, False, False]] * 2))
except ValueError as error:
    print(">", error)
lm = LanguageModel(model.grouped(np.asarray(policy.pattern)), mesh=two)
found = sj.nll(lm, range(40), cache=policy, chunk=16)
print(">", json.dumps([found.tolist(), lm.fingerprint()]))
"""


def test_on_a_mesh_each_device_has_as_many_heads_of_each_kind():
    config, weights, policy = four_heads()
    lm = LanguageModel(Decoder.from_weights(config, weights))
    expected = nll(lm, range(40), cache=policy, chunk=16)
    (ended,) = run_processes(ON_TWO, processes=1, devices=2, timeout=240)
    assert ended.code == 0, ended.err
    unlike, odd, result = ended.out.split("> ")[1:]
    assert "layer 0 do not lie alike on 2 devices: load the model with heads=pattern" in unlike
    assert "1 retrieval and 3 streaming heads of a layer do not divide over 2 devices" in odd
    found, fingerprint = json.loads(result)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # sums over devices in another order
    assert fingerprint == lm.fingerprint()


def test_memory():
    def size(policy, kv_heads=32):
        init = functools.partial(LayerCaches.init, layers=2, batch=1, kv_heads=kv_heads)
        shapes = jax.eval_shape(lambda: init(policy, head_dim=128, dtype=jnp.bfloat16))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.layers))

    pattern = np.zeros((2, 32), bool)
    pattern[:, ::4] = True
    full = FullCache(131_072)
    split = HeadSplit(full, SinkRing(64, 256, "absolute"), pattern)
    assert size(full) / size(split) > 3.9  # a quarter of the heads, and 320 tokens of the others


def test_gates_on_disk(tmp_path):
    gates = np.random.default_rng(0).uniform(size=(3, 4)).round(3)
    write_gates(tmp_path / "gates", gates, sink_size=64, recent_size=256)
    np.testing.assert_array_equal(read_gates(tmp_path / "gates"), gates)
    np.testing.assert_array_equal(
        read_gates(tmp_path / "gates" / "full_attention_heads.tsv"), gates
    )
    settings = json.loads((tmp_path / "gates" / "config.json").read_text())
    assert settings == {"sink_size": 64, "recent_size": 256}
    with pytest.raises(FileNotFoundError):
        read_gates(tmp_path / "none.tsv")
    for text in ("", "a\tb\n", "1\t0\n1\n", "nan\t1\n"):
        (tmp_path / "bad.tsv").write_text(text)
        with pytest.raises(ValueError, match="is no table of numbers"):
            read_gates(tmp_path / "bad.tsv")


@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.75, 0.9, 1])
def test_as_many_heads_as_the_original_code_keeps(sparsity):
    gates = np.random.default_rng(0).permutation(32 * 8).reshape(32, 8) / 256
    threshold = np.quantile(gates, sparsity) if sparsity < 1 else 2
    np.testing.assert_array_equal(retrieval_heads(gates, sparsity), gates >= threshold)


def test_equal_gates_keep_the_earlier_layers():
    pattern = retrieval_heads(np.ones((4, 2)), 0.5)
    np.testing.assert_array_equal(pattern, [[True, True]] * 2 + [[False, False]] * 2)


def test_specs(tmp_path):
    write_gates(tmp_path / "g", np.array([[0.9, 0.1], [0.2, 0.8]]))
    duo = f"duo:{tmp_path}/g@0.5,4+12"
    pattern = [[True, False], [False, True]]
    ring = SinkRing(4, 12, positions="absolute", kv_dtype="int4")
    wide = SinkRing(64, 256, positions="absolute")
    for spec, policy in {
        "ring:4+1020": SinkRing(4, 1020),
        "ring:0+8,int8": SinkRing(0, 8, kv_dtype="int8"),
        "ring:64+256,absolute": SinkRing(64, 256, positions="absolute"),
        "full:8192": FullCache(8192),
        "full": FullCache(77),
        "full,int4": FullCache(77, "int4"),
        f"{duo},99,int4": HeadSplit(FullCache(99, "int4"), ring, pattern),
        f"duo:{tmp_path}/g@0.5": HeadSplit(FullCache(77), wide, pattern),
    }.items():
        assert parse_policy(spec, tokens=77) == policy, spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o:512", "no cache policy 'h2o:512': expected one of"),
        ("ring", "needs SINKS\\+WINDOW"),
        ("ring:512", "needs SINKS\\+WINDOW"),
        ("ring:4+0", "window must be ≥ 1, got 0"),
        ("ring:4+8,int2", "'int2' in cache policy"),
        ("full", "must say how many tokens it holds"),
        ("full:4+8,9", "holds everything, and has no ring"),
        ("full:9,absolute", "'absolute' in cache policy"),
        ("duo:x.tsv,4+8,9", "needs PATTERN@SPARSITY"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(spec)


def test_wrong_patterns(tmp_path):
    with pytest.raises(ValueError, match="table of booleans .*, got float64 of shape"):
        HeadSplit(FULL, RING, np.ones((2, 2)))
    with pytest.raises(ValueError, match="2 layers of 3 KV heads, this model has 2 of 2"):
        tiny_decoder(97).init_caches(HeadSplit(FULL, RING, np.ones((2, 3), bool)))
    with pytest.raises(ValueError, match=r"in \[0, 1\]: 1.5"):
        retrieval_heads(np.ones((2, 2)), 1.5)
    with pytest.raises(CacheFull, match="the FullCache of 48 tokens is full"):
        HeadSplit(FULL, RING, np.eye(2, dtype=bool)).check(49)
    write_gates(tmp_path, np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="holds gates between 0 and 1"):
        HeadSplit(FULL, RING, tmp_path)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("split", [False, True])
def test_without_an_end_a_cache_is_the_same_until_it_is_full(split, kv_dtype):
    """And at every token after that a ring of its size."""
    model, full = tiny_decoder(97), FullCache(24, kv_dtype)
    policy = HeadSplit(full, RING, [[True, False], [True, True]]) if split else full
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 97, (1, 60)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(policy, tokens):
        return model(tokens, model.init_caches(policy))[0]

    endless = without_end(policy)
    assert (policy.limit, endless.limit, endless.capacity) == (24, None, 24)
    found = run(endless, tokens)
    # The ring's slots are summed in two parts, sinks and window: some roundings of float32.
    np.testing.assert_allclose(found[:, :24], run(policy, tokens[:, :24]), atol=1e-5)
    ring = SinkRing(4, 20, kv_dtype=kv_dtype)
    expected = HeadSplit(ring, RING, policy.pattern) if split else ring
    np.testing.assert_array_equal(found, run(expected, tokens))


def test_each_layer_goes_on_without_end():
    layers = PerLayer((RING, FullCache(24), SplitHeads(FULL, RING, PATTERN)))
    tail = SplitHeads(SinkRing(4, 44), RING, PATTERN)
    assert without_end(layers) == PerLayer((RING, SinkRing(4, 20), tail))


def test_what_has_no_end_stays_as_it_is():
    assert without_end(RING) is RING
    with pytest.raises(ValueError, match="4 tokens is too small to go on as a stream with 4 sinks"):
        without_end(FullCache(4))
