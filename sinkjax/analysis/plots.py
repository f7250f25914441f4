"""Curves against the position in a stream, and heat maps of recall."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike

from sinkjax.analysis.passkey import Grid
from sinkjax.analysis.perplexity import Curve, bucketed
from sinkjax.analysis.streameval import Recall

# Okabe and Ito's colours, which everybody can tell apart.
_COLORS = {
    "dense": "#E69F00",
    "window": "#D55E00",
    "recompute": "#009E73",
    "streaming": "#0072B2",
}
_OTHERS = ("#CC79A7", "#56B4E9", "#000000", "#999999")  # of caches that are no mode


def plot_curves(
    curves: Mapping[str, Curve],
    *,
    bucket: int = 1024,
    trained_context: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws perplexity against position, one line a mode (StreamingLLM, figure 3).

    A mode that scored samples alone is drawn with `streaming`, if that is there, as its guide (see
    `bucketed`).

    Args:
        curves: from `perplexity_curves`.
        bucket: tokens that each point stands for.
        trained_context: marked where the text is long enough to pass it.
        ax: where to draw; None: a new figure.

    Returns:
        The figure that was drawn on.

    Raises:
        ValueError: bucket < 1.
    """
    ax = _axes(ax, "position in the text (tokens)", f"perplexity per {bucket:,} tokens")
    longest = max(len(curve.nll) for curve in curves.values())
    seen: list[float] = []
    for mode, curve in curves.items():
        guide, label = None, mode
        if len(curve.nll) < longest:
            guide, label = curves.get("streaming"), f"{mode} ({len(curve.nll):,} samples)"
        x, y = bucketed(curve, bucket, guide)
        _line(ax, mode, x, y, label)
        seen += list(y[np.isfinite(y)])
    if trained_context and trained_context < max(c.positions[-1] for c in curves.values()):
        _mark(ax, trained_context, "trained context")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    if seen:  # whole octaves: else a flat curve lies between two ticks
        low, high = np.floor(np.log2(min(seen))), np.ceil(np.log2(max(seen)))
        ax.set_ylim(2.0**low, 2.0 ** max(high, low + 1))
    return _finished(ax)


def plot_recall(
    results: Mapping[str, Recall],
    *,
    bucket: int = 1024,
    capacity: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws accuracy against the length of the stream (StreamingLLM, figure 9).

    Args:
        results: from `stream_recall`.
        bucket: tokens that each point stands for.
        capacity: where the caches are full; marked.
        ax: where to draw; None: a new figure.

    Returns:
        The figure that was drawn on.

    Raises:
        ValueError: bucket < 1.
    """
    ax = _axes(ax, "length of the stream (tokens)", "accuracy")
    for mode, recall in results.items():
        parts = recall.buckets(bucket)
        x = [part.tokens.mean() for part in parts]
        _line(ax, mode, x, [part.accuracy for part in parts], mode)
    if capacity:
        _mark(ax, capacity, "cache full")
    ax.set_ylim(-0.03, 1.03)
    return _finished(ax)


def plot_grids(grids: Mapping[str, Grid]) -> Figure:
    """Draws a heat map of recall for each policy, side by side.

    Args:
        grids: by the names of their policies; of the same lengths and depths.

    Returns:
        A new figure.
    """
    first = next(iter(grids.values()))
    wide, high = len(first.lengths), len(first.depths)
    # Inches: of the cells, of what is beside them, of the colour bar.
    size = (len(grids) * max(2.4, 0.55 * wide + 0.6) + 1.4, max(2.4, 0.36 * high + 1.2))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    for ax, (name, grid) in zip(axes, grids.items(), strict=True):
        # Cividis: as everybody sees it.
        image = ax.imshow(grid.recall, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid.recall):
            color = "black" if value > 0.5 else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, size=7)
        ax.set_title(f"{name}\n{grid.mean:.1%}", size=8)
        ax.set_xticks(range(wide), [f"{n:,}" for n in grid.lengths], rotation=45, size=8)
        ax.set_yticks(range(high), [f"{depth:.0%}" for depth in grid.depths], size=8)
    figure.supxlabel("length of the prompt (tokens)", size=9)
    axes[0].set_ylabel("depth of the answer", size=9)
    figure.colorbar(image, ax=axes, label="recall", shrink=0.8)
    return figure


def _axes(ax: Axes | None, x: str, y: str) -> Axes:
    # Not through pyplot: it would keep every figure, and choose a screen.
    ax = ax or Figure(figsize=(7.2, 4), dpi=200, layout="constrained").add_subplot()
    ax.set_prop_cycle(color=_OTHERS)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _line(ax: Axes, mode: str, x: ArrayLike, y: ArrayLike, label: str) -> None:
    ax.plot(x, y, label=label, color=_COLORS.get(mode), marker="o", markersize=3, linewidth=1.8)


def _mark(ax: Axes, x: int, label: str) -> None:
    ax.axvline(x, label=f"{label} ({x:,})", color="0.4", linestyle=":", linewidth=1.4)


def _finished(ax: Axes) -> Figure:
    ax.set_xlim(left=0)
    ax.legend(frameon=False)
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
