"""What a model remembers. One policy per file, one protocol (see `protocol.py`)."""

from sinkjax.caches.full import CacheFull, FullCache
from sinkjax.caches.heads import HeadSplit
from sinkjax.caches.pattern import read_gates, retrieval_heads, write_gates
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
from sinkjax.caches.spec import parse_policy, without_end

__all__ = [
    "Cache",
    "CacheFull",
    "FullCache",
    "HeadSplit",
    "LayerCaches",
    "LayerPolicy",
    "ModelPolicy",
    "PerLayer",
    "Policy",
    "Positions",
    "Scores",
    "SinkRing",
    "by_layer",
    "parse_policy",
    "read_gates",
    "retrieval_heads",
    "without_end",
    "write_gates",
]
