"""What a model remembers. One policy per file, one protocol (see `protocol.py`)."""

from sinkjax.caches.full import CacheFull, FullCache
from sinkjax.caches.protocol import Cache, LayerCaches, Policy, Positions
from sinkjax.caches.ring import SinkRing

__all__ = ["Cache", "CacheFull", "FullCache", "LayerCaches", "Policy", "Positions", "SinkRing"]
