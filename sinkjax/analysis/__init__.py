"""What a bounded cache costs and saves: perplexity over long texts, recall in long streams."""

from sinkjax.analysis.perplexity import Curve, load_text, perplexity_curves, text_ids
from sinkjax.analysis.plots import plot_curves, plot_recall
from sinkjax.analysis.streameval import Recall, Task, stream_recall

__all__ = [
    "Curve",
    "Recall",
    "Task",
    "load_text",
    "perplexity_curves",
    "plot_curves",
    "plot_recall",
    "stream_recall",
    "text_ids",
]
