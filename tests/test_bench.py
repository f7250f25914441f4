"""The benchmark's command: what it takes and what it says, not how fast."""

import json

import jax
import numpy as np
import pytest

from sinkjax import FullCache, HeadSplit, Sampling, SinkRing, Stream, bench
from tests.conftest import python

FLAGS = ("--model=random", "--tokens=4", "--prefill=20", "--chunk=16")


@pytest.mark.parametrize(
    ("cache", "slots"), [("ring:4+12", [16, 16]), ("full:40,int8", [40, 40]), ("full", [24, 24])]
)
def test_speed_of_any_cache(cache, slots):
    done = python("-m", "sinkjax.bench", "speed", *FLAGS, "--cache", cache)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["cache"] == cache and found["decode_tokens_per_s"] > 0
    # Keys and values of 2 heads of 16, in each of 2 layers; with int8, a scale for each head.
    each = 2 * 2 * (16 + 4) if "int8" in cache else 2 * 2 * 16 * 4
    assert found["cache_bytes"] == sum(slots) * each + 8  # a clock


def test_speed_of_several_caches_far_into_a_stream(tmp_path):
    (tmp_path / "gates.tsv").write_text("1\t0\n0\t0\n")
    specs = [f"duo:{tmp_path / 'gates.tsv'}@0.75,4+12", "full:9000,int8"]
    flags = ["--model=random", "--tokens=6", "--steps_per_call=4", "--at=9000"]
    done = python("-m", "sinkjax.bench", "speed", *flags, *(f"--cache={spec}" for spec in specs))
    assert done.returncode == 0, done.stderr.decode()
    duo, full = map(json.loads, done.stdout.splitlines())
    assert [duo["cache"], full["cache"]] == specs and duo["at"] == full["at"] == 9000
    # A head of 16, its keys and values, and a clock for each kind of heads.
    assert duo["cache_bytes"] == (9000 + 3 * 16) * 2 * 16 * 4 + 2 * 8
    assert all(found["decode_tokens_per_s"] > 0 for found in (duo, full))
    assert "prefill_tokens_per_s" not in duo


@pytest.mark.parametrize("tokens", [3, 15, 16, 17, 40])
@pytest.mark.parametrize(
    "policy",
    [
        SinkRing(4, 12),
        FullCache(48),
        HeadSplit(FullCache(48), SinkRing(2, 9, "absolute"), [[True, False], [False, False]]),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_the_clocks_are_as_if_it_had_read(tiny_lm, policy, tokens):
    read, other = (Stream(tiny_lm, cache=policy, sampling=Sampling()) for _ in range(2))
    read.feed([[1] * tokens])
    bench.as_if_read(other, tokens)

    def check() -> None:
        for a, b in zip(*(s.state.caches.clocks for s in (read, other)), strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)

    check()
    for stream in (read, other):
        assert len(list(stream.run(8))) == 8
    check()
    assert [row.tokens for row in read.rows] == [row.tokens for row in other.rows]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["speed", "--caches=64"], "--caches belongs to recompute and forever, not to speed"),
        (["forever", "--cache=ring:4+12"], "--cache belongs to speed, not to forever"),
        (["speed", "--cache=ring:4"], "cache policy 'ring:4' needs SINKS+WINDOW"),
        (["speed", "--cache=full:19"], "the FullCache of 19 tokens is full: a row would hold 20"),
        (["speed", "--cache=full:20", "--tokens=18"], "no room for the 18 to decode"),
        (["forever", "--at=900"], "--at belongs to speed, not to forever"),
        (["speed", "--at=900"], "--at measures decode alone: leave out --prefill"),
        (["speed", "--cache=full:9", "--cache=full:9"], "--cache must name each policy once"),
    ],
)
def test_what_it_refuses(flags, message):
    done = python("-m", "sinkjax.bench", *FLAGS, *flags)
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--at=6"], "--at must be more than the 6 tokens to decode, got 6"),
        (["--at=41", "--cache=full:40"], "FullCache of 40 tokens is full: a row would hold 41"),
    ],
)
def test_how_far_is_refused(flags, message):
    done = python("-m", "sinkjax.bench", "speed", "--model=random", "--tokens=4", *flags)
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
