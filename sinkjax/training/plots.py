"""How a training of gates went, and what it found."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure


def plot_training(
    steps: Float[np.ndarray, " N"],
    distillation: Float[np.ndarray, " N"],
    mean_gate: Float[np.ndarray, " N"],
    gates: Float[np.ndarray, "layers kv_heads"],
) -> Figure:
    """Draws the loss and the mean gate against the step, and the gate of each head as a map."""
    # Not through pyplot: it would keep every figure, and choose a screen.
    figure = Figure(figsize=(9.6, 4), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.plot(steps, distillation, color="#0072B2", linewidth=1, label="distillation loss")
    left.set_xlabel("step")
    left.set_ylabel("distillation loss")
    if (distillation > 0).any():
        left.set_yscale("log")
    gate = left.twinx()
    gate.plot(steps, mean_gate, color="#D55E00", linewidth=1.8, label="mean gate")
    gate.set_ylim(-0.03, 1.03)
    gate.set_ylabel("mean gate")
    lines = [*left.get_lines(), *gate.get_lines()]
    labels = [str(line.get_label()) for line in lines]
    left.legend(lines, labels, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    shown = right.imshow(gates, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    right.set_xlabel("KV head")
    right.set_ylabel("layer")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=right, label="gate: 1 needs all tokens")
    return figure
