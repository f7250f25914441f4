"""Language models that run for ever: a bounded, fixed-shape KV cache, in JAX."""

from sinkjax.caches import CacheFull, FullCache, SinkRing
from sinkjax.streaming import LanguageModel, Sampling, Stream, nll

load = LanguageModel.load

__all__ = [
    "CacheFull",
    "FullCache",
    "LanguageModel",
    "Sampling",
    "SinkRing",
    "Stream",
    "load",
    "nll",
]
