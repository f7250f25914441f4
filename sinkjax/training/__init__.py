"""What is learned on top of a frozen model."""

from sinkjax.training.gates import GateTrainer, GateTraining, Metrics, train_gates
from sinkjax.training.passkeys import PasskeyRows, Passkeys
from sinkjax.training.plots import plot_training

__all__ = [
    "GateTrainer",
    "GateTraining",
    "Metrics",
    "PasskeyRows",
    "Passkeys",
    "plot_training",
    "train_gates",
]
