"""Language models that run for ever: a bounded, fixed-shape KV cache, in JAX."""

from sinkjax.caches import CacheFull, FullCache, HeadSplit, PerLayer, SinkRing
from sinkjax.mesh import make as make_mesh
from sinkjax.streaming import LanguageModel, Sampling, Stream, nll

load = LanguageModel.load

__all__ = [
    "CacheFull",
    "FullCache",
    "HeadSplit",
    "LanguageModel",
    "PerLayer",
    "Sampling",
    "SinkRing",
    "Stream",
    "load",
    "make_mesh",
    "nll",
]
