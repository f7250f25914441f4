"""Attention ops for streaming: arrays in, arrays out. Needs jax, and nothing of sinkjax."""
