"""What a model remembers. One policy per file, one protocol (see `protocol.py`)."""

from sinkjax.caches.full import CacheFull, FullCache
from sinkjax.caches.protocol import (
    Cache,
    LayerCaches,
    LayerPolicy,
    ModelPolicy,
    PerLayer,
    Policy,
    Positions,
    Scores,
    by_layer,
)
from sinkjax.caches.ring import SinkRing

__all__ = [
    "Cache",
    "CacheFull",
    "FullCache",
    "LayerCaches",
    "LayerPolicy",
    "ModelPolicy",
    "PerLayer",
    "Policy",
    "Positions",
    "Scores",
    "SinkRing",
    "by_layer",
]
