"""The tiny models that `scripts/make_model_reference.py` wrote."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sinkjax.caches import FullCache, SinkRing
from sinkjax.models import Decoder

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = sorted(folder.name for folder in DATA.iterdir())


def reference(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[2, T]`, and the logits `[2, T, V]` that transformers gave for them in float64."""
    stored = np.load(DATA / name / "reference.npz")
    return stored["tokens"], stored["logits"]


def logits_of(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    everywhere = model.config.sliding_window if model.config.local_layers is None else None
    policy = SinkRing(0, everywhere) if everywhere else FullCache(tokens.shape[1])
    caches = model.init_caches(policy, batch=len(tokens))
    return np.asarray(run(model, tokens, caches)[0])


@pytest.fixture(scope="module")
def quick_compiles():
    """Half the time to compile, for programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@jax.jit
def run(model: Decoder, tokens, caches):
    """Logits, and the caches."""
    hidden, caches = model(tokens, caches)
    return model.logits(hidden), caches
