"""What a bounded cache costs and saves: perplexity over long texts, recall in long streams and of
what lies far back."""

from sinkjax.analysis.passkey import (
    Grid,
    Prompt,
    needle_prompts,
    passkey_prompts,
    recall_by_reading,
    recall_by_writing,
)
from sinkjax.analysis.perplexity import Curve, load_text, perplexity_curves, text_ids
from sinkjax.analysis.plots import plot_curves, plot_grids, plot_recall
from sinkjax.analysis.streameval import Recall, Task, stream_recall

__all__ = [
    "Curve",
    "Grid",
    "Prompt",
    "Recall",
    "Task",
    "load_text",
    "needle_prompts",
    "passkey_prompts",
    "perplexity_curves",
    "plot_curves",
    "plot_grids",
    "plot_recall",
    "recall_by_reading",
    "recall_by_writing",
    "stream_recall",
    "text_ids",
]
