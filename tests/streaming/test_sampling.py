"""Which tokens may be drawn, by the definitions in float64 numpy; and how often they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import Sampling
from sinkjax.streaming.sampling import sample

VOCAB = 24
N = 10_000  # draws; one number, so that each setting is compiled once
NONE = np.full(0, -1)


def probabilities(logits, s: Sampling, recent=()) -> np.ndarray:
    """Of each token, after penalty, temperature, top-k, top-p and min-p, in this order."""
    x = np.array(logits, np.float64)
    for token in {t for t in recent if t >= 0}:
        x[token] = (
            x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        )
    x /= s.temperature
    allowed = set(range(len(x)))
    best_first = sorted(allowed, key=lambda t: -x[t])
    if s.top_k:
        allowed = set(best_first[: s.top_k])

    def normalised():
        p = np.array([np.exp(x[t] - x.max()) if t in allowed else 0.0 for t in range(len(x))])
        return p / p.sum()

    if s.top_p < 1:
        p, nucleus = normalised(), []
        for token in best_first:
            if sum(p[t] for t in nucleus) >= s.top_p:
                break
            nucleus.append(token)
        allowed &= set(nucleus)
    p = normalised()
    allowed = {t for t in allowed if p[t] >= s.min_p * p.max()}
    return normalised()


def scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=VOCAB, scale=1.5).astype(np.float32)


@functools.partial(jax.jit, static_argnames="sampling")
def draw(logits, sampling, recent, seeds, positions):
    return sample(logits, sampling, recent=recent, seeds=seeds, positions=positions)


def draws(logits, sampling, recent=NONE, *, seed: int = 0) -> np.ndarray:
    """N draws of one stream: one seed, N positions."""
    return np.asarray(
        draw(
            jnp.broadcast_to(logits, (N, VOCAB)),
            sampling,
            jnp.broadcast_to(jnp.asarray(recent, jnp.int32), (N, len(recent))),
            jnp.full(N, seed, jnp.uint32),
            jnp.arange(N, dtype=jnp.uint32),
        )
    )


RECENT = (3, 5, 3, -1, 11, 20)
SETTINGS = {
    "temperature": Sampling(temperature=0.7),
    "hot": Sampling(temperature=2.5),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_k of one": Sampling(temperature=1.0, top_k=1),
    "top_k beyond the vocabulary": Sampling(temperature=1.0, top_k=1000),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "top_p of next to nothing": Sampling(temperature=1.0, top_p=1e-6),
    "min_p": Sampling(temperature=1.0, min_p=0.1),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.8),
    "reward": Sampling(temperature=1.0, repetition_penalty=0.6),
    "all": Sampling(temperature=1.3, top_k=15, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_drawn_as_often_as_they_are_likely(name):
    sampling = SETTINGS[name]
    recent = RECENT if sampling.memory else NONE
    p = probabilities(scores(), sampling, recent)
    counts = np.bincount(draws(scores(), sampling, recent), minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(p))
    # Every count within five of its own standard deviations: missed by chance once in 10⁵ tests;
    # the seeds are fixed, so a pass stays a pass.
    assert np.all(np.abs(counts - N * p) <= 5 * np.sqrt(N * p * (1 - p)) + 1e-6 * N)
    # Tokens that are likely enough to be seen for sure have been seen.
    assert set(np.flatnonzero(p > 20 / N)) <= set(np.flatnonzero(counts))


@pytest.mark.parametrize("seed", range(1, 6))
def test_allowed_sets_are_those_of_the_definition(seed):
    """Other scores each time; the sets alone, where every allowed token is likely to come."""
    for sampling in SETTINGS.values():
        recent = RECENT if sampling.memory else NONE
        p = probabilities(scores(seed), sampling, recent)
        seen = set(draws(scores(seed), sampling, recent, seed=seed))
        assert seen <= set(np.flatnonzero(p))
        assert set(np.flatnonzero(p > 0.005)) <= seen  # (1 − 0.005)^N = 2e-22


def test_equal_scores_are_all_kept():
    """No filter may choose among equals by their order."""
    logits = np.where(np.arange(VOCAB) < 6, 1.0, -9.0).astype(np.float32)
    for sampling in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.3)):
        assert set(draws(logits, sampling)) == set(range(6))


def test_greedy_takes_the_likeliest_and_looks_at_nothing_else():
    logits = np.stack([scores(seed) for seed in range(16)])
    greedy = Sampling(temperature=0, top_k=3, top_p=0.2, min_p=0.9)
    rows = jnp.zeros(16, jnp.uint32)
    drawn = draw(logits, greedy, jnp.zeros((16, 0), jnp.int32), rows, rows)
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))


def test_greedy_with_a_penalty():
    sampling = Sampling(repetition_penalty=5.0)
    logits, recent = scores(), [int(scores().argmax())]
    expected = np.argsort(-logits)[1]
    assert draws(logits, sampling, recent)[0] == expected
    assert draws(logits, sampling, [-1])[0] == recent[0]  # −1 is no token, not the last one


def test_a_penalty_counts_a_token_once():
    logits = np.array([2.0, 1.5] + [-5.0] * (VOCAB - 2), np.float32)
    # 2 / 1.2 > 1.5, while 2 / 1.2 / 1.2 is not.
    assert draws(logits, Sampling(repetition_penalty=1.2), [0, 0, 0])[0] == 0


def test_no_temperature_is_too_low_or_too_high():
    cold, hot = Sampling(temperature=1e-6), Sampling(temperature=1e6)
    assert set(draws(scores(), cold)) == {int(scores().argmax())}
    assert set(draws(scores(), hot)) == set(range(VOCAB))


def test_a_row_draws_the_same_in_any_batch():
    sampling = SETTINGS["all"]
    logits = np.stack([scores(seed) for seed in range(5)])
    recent = np.tile(np.asarray(RECENT, np.int32), (5, 1))
    seeds, positions = np.arange(5, dtype=np.uint32), np.arange(100, 105, dtype=np.uint32)
    together = draw(logits, sampling, recent, seeds, positions)
    for order in ([3], [2, 2, 1], [4, 3, 2, 1, 0]):
        apart = draw(logits[order], sampling, recent[order], seeds[order], positions[order])
        np.testing.assert_array_equal(apart, together[np.asarray(order)])


def test_draws_differ_by_seed_and_by_position():
    sampling = Sampling(temperature=1.0)
    first, again, other = (draws(scores(), sampling, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first == other) < 0.5
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(min_p=1),
        dict(min_p=-0.1),
        dict(repetition_penalty=0),
        dict(repetition_window=0),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be .*, got"):
        Sampling(**wrong)


def test_all_values_out_of_range_are_named_at_once():
    with pytest.raises(ValueError, match="top_k.*; min_p"):
        Sampling(top_k=-1, min_p=2)
