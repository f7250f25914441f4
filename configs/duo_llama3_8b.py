"""Llama-3-8B with a long context, as DuoAttention's authors trained it, on one accelerator."""

from sinkjax.training import GateTraining

CONFIG = GateTraining(
    model="gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    # The authors have 50 lengths; each is compiled for, so here are 16.
    lengths=tuple(range(2048, 32_769, 2048)),
    dtype="bfloat16",
)
