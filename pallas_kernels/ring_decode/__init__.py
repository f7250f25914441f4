"""Attention of one or a few new tokens a row over a ring, which takes them in."""

from pallas_kernels.ring_decode.api import ring_decode

__all__ = ["ring_decode"]
