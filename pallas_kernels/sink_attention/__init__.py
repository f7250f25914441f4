"""Attention over cached and new keys, the first of which (sinks) may see a query of their own."""

from pallas_kernels.sink_attention.reference import Segment, sink_attention

__all__ = ["Segment", "sink_attention"]
