"""Text in and out: tokenizer, chat templates, incremental detokenizing, stop strings."""

from sinkjax.text.detokenize import Detokenizer, StopStrings
from sinkjax.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings", "Tokenizer"]
