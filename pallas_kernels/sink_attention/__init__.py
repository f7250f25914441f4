"""Attention over [sinks | window | causal chunk], forward and backward."""

from pallas_kernels.sink_attention.api import sink_attention

__all__ = ["sink_attention"]
