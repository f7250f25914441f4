"""What holds for every family: logits as transformers gives them, streams, round trips."""

import json

import numpy as np
import pytest

from sinkjax.caches import FullCache, LayerCaches, PerLayer, SinkRing
from sinkjax.checkpoints import open_checkpoint, orbax
from sinkjax.models import Decoder, families
from sinkjax.models.families.common import unpermute
from tests.models.conftest import DATA, NAMES, logits_of, reference, run
from tests.oracle import OracleCache

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLOSE = 1e-5  # of the largest logit: float32 through some layers against float64 gives 1e-6


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The greatest difference, over the greatest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_all_families_have_a_reference():
    kinds = {json.loads((DATA / n / "config.json").read_text())["model_type"] for n in NAMES}
    # Gemma 3's wrapper with a part for images holds the text model of another folder.
    assert kinds == set(families.FAMILIES) - {"gemma3"}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_round_trip(name, tmp_path):
    model = open_checkpoint(str(DATA / name)).model
    tokens, expected = reference(name)
    found = logits_of(model, tokens)
    assert error(found, expected) < CLOSE

    orbax.save_model(tmp_path / "saved", model.config, model, None)
    again = open_checkpoint(str(tmp_path / "saved")).model
    assert again.config == model.config
    np.testing.assert_array_equal(logits_of(again, tokens), found)

    weights = model.weights()
    for path, x in weights.items():
        if path.endswith("attention.q"):
            weights[path] = unpermute(np.asarray(x).T, model.config.heads).T
    assert error(logits_of(Decoder.from_weights(model.config, weights), tokens), expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_that_of_the_float64_oracle(name):
    """Three wraps of the window, two sequences, in uneven chunks and one token at a time. Layers
    with a window of their own keep that."""
    model = open_checkpoint(str(DATA / name)).model
    tokens, _ = reference(name)
    ring = SinkRing(2, 11)
    caches = model.init_caches(ring, batch=len(tokens))
    for layer, cache in enumerate(caches):
        window = model.config.window(layer)
        expected = ring if window is None or window >= 11 else SinkRing(0, window)
        assert cache.policy == expected

    expected, _ = run(model, tokens, [OracleCache(cache.policy) for cache in caches])
    parts = []
    for start, end in ((0, 13), (13, 26), (26, 39), (39, 40)):
        logits, caches = run(model, tokens[:, start:end], caches)
        parts.append(logits)
    assert error(np.concatenate(parts, axis=1), np.asarray(expected)) < CLOSE


def test_per_layer():
    model = open_checkpoint(str(DATA / "llama3")).model
    tokens, expected = reference("llama3")
    both = PerLayer([FullCache(40), SinkRing(1, 39, positions="absolute")])
    caches = model.init_caches(both, batch=2)
    assert [cache.policy for cache in caches] == list(both.policies)
    assert isinstance(caches, LayerCaches) and len(caches.clocks) == 2
    logits, _ = run(model, tokens, caches)
    assert error(logits, expected) < CLOSE
    assert (both.capacity, both.limit) == (40, 40)
    with pytest.raises(ValueError, match="PerLayer has 1 policies, the model 2 layers"):
        model.init_caches(PerLayer([FullCache(40)]))
    with pytest.raises(ValueError, match="the FullCache of 40 tokens is full"):
        both.check(41)


def test_a_window_of_the_model_is_not_exceeded():
    model = open_checkpoint(str(DATA / "gemma2")).model
    window = model.config.sliding_window
    with pytest.raises(ValueError, match=f"layer 0 .* sliding window of {window}"):
        model.init_caches(PerLayer([SinkRing(4, window + 1)] * model.config.layers))
