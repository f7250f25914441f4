"""Language models that run for ever: a bounded, fixed-shape KV cache, in JAX."""

from sinkjax.caches import CacheFull, FullCache, PerLayer, SinkRing
from sinkjax.mesh import make as make_mesh
from sinkjax.streaming import LanguageModel, Sampling, Stream, nll

load = LanguageModel.load

__all__ = [
    "CacheFull",
    "FullCache",
    "LanguageModel",
    "PerLayer",
    "Sampling",
    "SinkRing",
    "Stream",
    "load",
    "make_mesh",
    "nll",
]
