"""Attention over a list of key blocks per query block and head, forward and backward."""

from pallas_kernels.block_sparse.api import block_sparse_attention

__all__ = ["block_sparse_attention"]
