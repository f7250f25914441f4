"""Trains what is learned on top of a frozen model.

Usage: python -m sinkjax.train gates --config configs/duo_smollm2.py [--out DIR] [--resume] …

gates: DuoAttention's, one a KV head and layer: which heads must remember everything? Writes them
(DIR/gates, for the cache policy duo:DIR/gates@0.5), metrics.csv, gates.png and checkpoints.

A config is a Python file that defines CONFIG, a `sinkjax.training.GateTraining`.
"""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from sinkjax import cli
from sinkjax.mesh import is_main, together
from sinkjax.training import GateTrainer, GateTraining, Metrics, train_gates

FLAGS = flags.FLAGS


def read_config(path: str) -> GateTraining:
    """The experiment that a config file defines.

    Raises:
        OSError: there is no such file.
        ValueError: it does not run, or defines no CONFIG of that kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no config at {path!r}: expected a Python file, such as those in configs/"
        )
    try:
        config = runpy.run_path(path).get("CONFIG")
    except Exception as error:
        raise ValueError(f"the config {path} does not run: {error!r}") from error
    if not isinstance(config, GateTraining):
        raise ValueError(
            f"the config {path} must define CONFIG, a GateTraining, and has {type(config).__name__}"
        )
    return config


def run_gates() -> None:
    with together(f"reading {FLAGS.config}"):
        config = read_config(FLAGS.config)
    for name in ("model", "dtype"):  # the config's, unless the command says otherwise
        if FLAGS[name].present:
            said: Any = {name: FLAGS[name].value}
            config = dataclasses.replace(config, **said)
        FLAGS[name].value = getattr(config, name)
    out = Path(FLAGS.out or Path("runs") / Path(FLAGS.config).stem)
    trainer = GateTrainer(cli.load_model(), config)
    lengths = f"{min(config.lengths):,} to {max(config.lengths):,}"
    print(f"{trainer.lm.name}: gates of {trainer.gates.size} heads, contexts of {lengths} tokens")
    with tqdm(total=config.steps, unit="step", file=sys.stderr, disable=not is_main()) as bar:

        def progress(metrics: Metrics) -> None:
            bar.update(int(metrics.step) + 1 - bar.n)
            bar.set_postfix(
                distillation=f"{metrics.distillation:.3g}", mean_gate=f"{metrics.mean_gate:.3f}"
            )

        gates = train_gates(trainer, out, resume=FLAGS.resume, progress=progress)
    print(
        f"mean gate {gates.mean():.3f}, {(gates > 0.5).sum()} of {gates.size} above a half: {out}"
    )


def main(argv: list[str]) -> None:
    if argv != ["gates"]:
        raise app.UsageError(f"expected gates, got {' '.join(argv)!r}")
    run_gates()


def define_flags() -> None:
    cli.define_model_flags()
    flags.DEFINE_string("config", None, "A Python file that defines CONFIG.", required=True)
    flags.DEFINE_string(
        "out", None, "The folder to write to; by default runs/<name of the config>."
    )
    flags.DEFINE_bool("resume", False, "Go on from the checkpoint in that folder.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
