"""How a stream runs: prefill in chunks, the jitted step, sampling, stopping, saving, resuming."""

from sinkjax.streaming.language_model import LanguageModel, nll
from sinkjax.streaming.sampling import Sampling
from sinkjax.streaming.stream import Stream

__all__ = ["LanguageModel", "Sampling", "Stream", "nll"]
