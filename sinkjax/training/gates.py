"""Finds the heads that must remember: DuoAttention's gates, by optimisation (arXiv 2410.10819).

The model is frozen. Each KV head of each layer has a gate α in [0, 1], from 1 on, and gives
α · full + (1 − α) · streaming. Two passes go through the model: the first attends to everything and
needs no gradient; in the second, the streaming view is that of its own queries, keys and values,
and the full view what the first pass gave in the same place (as in the authors' code). So only
the streaming view, whose cost grows with the window, is differentiated. What is minimised is how
far the final hidden states of the second pass are from those of the first where passkeys are
recited, and the mean gate.
"""

import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.sink_attention import sink_attention
from sinkjax.analysis.perplexity import load_text, text_ids
from sinkjax.caches import LayerCaches, Positions, Scores, write_gates
from sinkjax.caches.protocol import PLAIN, rotated, within
from sinkjax.checkpoints.orbax import restore_tree, save_tree
from sinkjax.files import replaced
from sinkjax.mesh import AXES, DATA, MODEL, agree, fetch, is_main, together
from sinkjax.models import Decoder
from sinkjax.streaming import LanguageModel
from sinkjax.training.passkeys import PasskeyRows, Passkeys
from sinkjax.training.plots import plot_training

_SETTINGS, _STATE = "settings.json", "state"
_FREE = ("model", "save_every")  # settings that change no result (a model is told by its weights)


@dataclasses.dataclass(frozen=True)
class GateTraining:
    """An experiment. What is not given is as the authors have it for models of 7 and 8 billion.

    Attributes:
        model: what `sinkjax.load` takes.
        lengths: of contexts, in tokens; each step draws one, and each is compiled for once.
        dtype: of weights and activations. Gates, loss and optimiser are float32 regardless.
        steps: of the optimiser.
        batch: rows in each step.
        learning_rate: of Adam; it rises over the first fifth of the steps, and falls over the last.
        l1: the weight of the mean gate in the loss.
        sinks, recent: of the streaming view; a query itself is one of the recent tokens.
        task: the passkeys.
        seed: of the data.
        remat: compute the inside of each layer anew for the gradient, for long contexts; else a
            quarter less is computed.
        save_every: steps between checkpoints.

    Raises:
        ValueError: a value out of range.
    """

    model: str
    lengths: tuple[int, ...]
    dtype: str = "float32"
    steps: int = 2000
    batch: int = 1
    learning_rate: float = 0.02
    l1: float = 0.05
    sinks: int = 128
    recent: int = 256
    task: Passkeys = Passkeys()
    seed: int = 0
    remat: bool = True
    save_every: int = 50

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be some, each ≥ 1, got {self.lengths}")
        least = dict(steps=1, batch=1, recent=1, save_every=1, sinks=0, seed=0, l1=0)
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} must be ≥ {bound}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")

    def rate(self, step: Any) -> Array:
        """The learning rate of a step, from 0."""
        fifth = max(1, self.steps // 5)
        share = jnp.minimum((step + 1) / fifth, (self.steps - step) / fifth)
        return self.learning_rate * jnp.minimum(1.0, share)

    def length(self, step: int) -> int:
        """The context of a step."""
        return self.lengths[np.random.default_rng([self.seed, step]).integers(len(self.lengths))]


class Metrics(NamedTuple):
    """Of one step, before its update but for the last two."""

    step: float
    length: float
    loss: float
    distillation: float
    learning_rate: float
    mean_gate: float
    seconds: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullView:
    """In the place of a cache: attention over a whole text, which it keeps the output of.

    Attributes:
        out: `[B, T, H, D]`, once it has attended.
        policy: the window that the layer was trained with; None: everything.
    """

    out: Array | None = None
    clock: None = None
    policy: Any = dataclasses.field(default=None, metadata=dict(static=True))

    def attend(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        positions: Positions | None,
        lengths: Int32[Array, " B"] | None = None,
        *,
        scores: Scores = PLAIN,
        backend: str | None = None,
    ) -> tuple[Float[Array, "B T H D"], Self]:
        """See `Cache.attend`. All rows are of full length."""
        positions = within(positions, self.policy or q.shape[1])
        out = _attention(q, k, v, positions, 0, self.policy, scores, backend)
        return out, dataclasses.replace(self, out=out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedView:
    """In the place of a cache: sinks and recent tokens of a whole text, mixed with a full view.

    Attributes:
        gate: `[Hkv]`, float32.
        full: `[B, T, H, D]`, what the full view of the same layer gave.
        policy: sinks and recent tokens.
    """

    gate: Float[Array, " Hkv"]
    full: Float[Array, "B T H D"]
    clock: None = None
    policy: tuple[int, int] = dataclasses.field(default=(0, 1), metadata=dict(static=True))

    def attend(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        positions: Positions | None,
        lengths: Int32[Array, " B"] | None = None,
        *,
        scores: Scores = PLAIN,
        backend: str | None = None,
    ) -> tuple[Float[Array, "B T H D"], Self]:
        """See `Cache.attend`. All rows are of full length; sinks stay at their positions."""
        sinks, recent = self.policy
        positions = within(positions, 1 << 32 if sinks else recent)
        out = _attention(q, k, v, positions, sinks, recent, scores, backend)
        share = jnp.repeat(self.gate, q.shape[2] // k.shape[2])[:, None]
        mixed = share * self.full.astype(jnp.float32) + (1 - share) * out.astype(jnp.float32)
        return mixed.astype(q.dtype), self


def _attention(q, k, v, positions, sinks, window, scores, backend):
    at = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.uint32), q.shape[:2])
    return sink_attention(
        rotated(positions, q, at),
        rotated(positions, k, at),
        v,
        sinks=sinks,
        window=window,
        backend=backend,
        **scores._asdict(),
    )


def two_passes(
    model: Decoder,
    gates: Float[Array, "layers kv_heads"],
    tokens: Int32[Array, "B T"],
    sinks: int,
    recent: int,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """The final hidden states of the full pass and of the mixed one. Differentiable in the gates.

    Layers that were trained with a window of their own have that as their full view, and as their
    streaming view too where it is shorter than `recent` (as in `Decoder.init_caches`).
    """
    config = model.config
    views: list[Any] = []
    windows = [config.window(layer) for layer in range(config.layers)]
    full, seen = model(tokens, LayerCaches.of(FullView(policy=window) for window in windows))
    if model.shards > 1:  # those of this device's heads
        start = jax.lax.axis_index(MODEL) * config.kv_heads // model.shards
        own = max(1, config.kv_heads // model.shards)
        gates = jax.lax.dynamic_slice_in_dim(gates, start, own, axis=1)
    layers: Any = seen.layers
    for gate, view, window in zip(gates, layers, windows, strict=True):
        policy = (sinks, recent) if window is None or recent <= window else (0, window)
        views.append(MixedView(gate, jax.lax.stop_gradient(view.out), policy=policy))
    mixed, _ = model(tokens, LayerCaches.of(views))
    return full, mixed


class GateTrainer:
    """The state of a training.

    Args:
        lm: the model; on a mesh, `data` takes the rows of a batch.
        settings: the experiment.
        rows: of the data; None: made from the model's tokenizer and the task's text.

    Attributes:
        gates: `[layers, kv_heads]`, float32.
        step: how many were taken.
        history: `[steps, 7]`, float32, the `Metrics` of each.

    Raises:
        ValueError: a model with ALiBi or with its heads rearranged, a batch that does not divide
            over the mesh, or a text that is too short.
    """

    def __init__(self, lm: LanguageModel, settings: GateTraining, rows: PasskeyRows | None = None):
        if lm.config.alibi is not None:
            raise ValueError(
                "gates can't be trained for a model with ALiBi: its sinks have no use at their "
                "absolute positions, where DuoAttention's streaming heads have them"
            )
        if lm.model.head_order is not None:
            raise ValueError(
                "gates are trained for heads in the order of the checkpoint: load the model "
                "without heads=pattern"
            )
        groups = 1 if lm.mesh is None else lm.mesh.shape[DATA]
        if settings.batch % groups:
            raise ValueError(
                f"a batch of {settings.batch} rows does not divide over {groups} devices of the "
                f"mesh axis {DATA!r}: take a multiple of {groups}"
            )
        self.lm, self.settings = lm, settings
        self._rows = rows or _rows_of(lm, settings.task)
        self._optimiser = optax.adamw(settings.rate, weight_decay=0.0)
        self.gates: Any = np.ones((lm.config.layers, lm.config.kv_heads), np.float32)
        # Of numpy: several processes can't each bring an array of their own device.
        self._moments: Any = jax.tree.map(np.asarray, self._optimiser.init(self.gates))
        self.step = 0
        self.history = np.zeros((settings.steps, len(Metrics._fields)), np.float32)
        self.gradient = lm.mapped(self._gradient, (P(), P(DATA), P(DATA)), P())
        self._update = jax.jit(self._updated)

    def batch(self, step: int) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """The tokens of a step, and where the answers are. They follow from its number alone."""
        s = self.settings
        return self._rows.batch(s.batch, s.length(step), [s.seed, step])

    def train_step(self) -> tuple[Array, Array]:
        """Takes a step. Returns its loss, and the distillation in it."""
        tokens, answers = self.batch(self.step)
        (loss, distillation), gradient = self.gradient(self.gates, tokens, answers)
        self.gates, self._moments = self._update(gradient, self._moments, self.gates)
        self.step += 1
        return loss, distillation

    def steps(self) -> Iterator[Metrics]:
        """Takes those that are left, one at a time."""
        while self.step < self.settings.steps:
            begin, step = time.perf_counter(), self.step
            length, rate = self.settings.length(step), self.settings.rate(step)
            losses: Any = map(fetch, self.train_step())
            gate = fetch(self.gates).mean()
            seconds = time.perf_counter() - begin
            metrics = Metrics(*map(float, (step, length, *losses, rate, gate, seconds)))
            self.history[step] = metrics
            yield metrics

    def state(self) -> Any:
        """All that changes, as a tree of arrays."""
        own = (np.asarray(self.step, np.int32), self.history)
        return jax.tree.map(fetch, (self.gates, self._moments)), own

    def put(self, state: Any) -> None:
        """Goes on from what `state` gave."""
        (self.gates, self._moments), (step, history) = jax.tree.map(np.asarray, state)
        self.step, self.history = int(step), np.array(history)

    def _gradient(self, model: Decoder, gates: Array, tokens: Array, answers: Array):
        def loss(gates):
            full, mixed = two_passes(
                model, gates, tokens, self.settings.sinks, self.settings.recent
            )
            off = mixed.astype(jnp.float32) - full.astype(jnp.float32)
            squares = jnp.mean(off * off, axis=-1)
            by_row = jnp.sum(jnp.where(answers, squares, 0), axis=1) / jnp.sum(answers, axis=1)
            distillation = jnp.mean(by_row)
            return distillation + self.settings.l1 * jnp.mean(jnp.abs(gates)), distillation

        model.remat = self.settings.remat
        both, gradient = jax.value_and_grad(loss, has_aux=True)(gates)
        if self.lm.mesh is None:
            return both, gradient
        # Each device has the derivatives of the sum of all devices' losses, by its copy of the
        # gates: those of the mean loss, by all copies at once, are their mean.
        return jax.lax.pmean((both, gradient), AXES)

    def _updated(self, gradient, moments, gates):
        updates, moments = self._optimiser.update(gradient, moments, gates)
        return jnp.clip(optax.apply_updates(gates, updates), 0, 1), moments


def _rows_of(lm: LanguageModel, task: Passkeys) -> PasskeyRows:
    with together(f"reading {task.text}"):
        text = load_text(task.text)
    agree("the text", text)

    def encode(text: str) -> list[int]:
        return lm.tokenizer.encode(text, add_bos=False)

    start = lm.tokenizer.encode("")  # a beginning-of-text token, where the model wants one
    haystack = text_ids(text, lm.tokenizer, task.tokens)[len(start) :]
    return PasskeyRows(task, haystack, encode, start)


def train_gates(
    trainer: GateTrainer,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Callable[[Metrics], object] | None = None,
) -> Float[np.ndarray, "layers kv_heads"]:
    """Trains to the end, with checkpoints, and writes what was found.

    The folder gets `gates/` (see `sinkjax.caches.write_gates`), `metrics.csv` and `gates.png`; and
    `settings.json` and `state/`, from which a training that was ended goes on, and gives just what
    it would have given undisturbed.

    Args:
        trainer: fresh.
        folder: made if absent.
        resume: go on from the folder's checkpoint.
        progress: called after each step.

    Returns:
        The gates.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: the folder holds a training of other settings, or one that is not resumed.
        OSError: it can't be written.
    """
    folder = Path(folder)
    settings = _identity(trainer)
    with together(f"preparing {folder}"):
        if resume:
            _check_same(folder, settings)
        elif (folder / _SETTINGS).exists():
            raise ValueError(
                f"{folder} holds a training of gates already: resume it (--resume), or write to "
                "another folder (--out)"
            )
    if resume:
        trainer.put(restore_tree(folder / _STATE, trainer.state()))
    else:
        save_tree(folder / _STATE, trainer.state())
        with together(f"preparing {folder}"):
            if is_main():
                (folder / _SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    every, last = trainer.settings.save_every, trainer.settings.steps
    for metrics in trainer.steps():
        if trainer.step % every == 0 and trainer.step < last:
            _save(trainer, folder)
        if progress is not None:
            progress(metrics)
    _save(trainer, folder)
    return np.asarray(fetch(trainer.gates))


def _save(trainer: GateTrainer, folder: Path) -> None:
    save_tree(folder / _STATE, trainer.state())
    gates, done = fetch(trainer.gates), trainer.history[: trainer.step]
    with together(f"writing {folder}"):
        if not is_main():
            return
        s = trainer.settings
        write_gates(folder / "gates", gates, sink_size=s.sinks, recent_size=s.recent)
        with (
            replaced(folder / "metrics.csv") as part,
            open(part, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Metrics._fields)
            writer.writerows([f"{x:.6g}" for x in row] for row in done)
        columns = dict(zip(Metrics._fields, done.T, strict=True))
        figure = plot_training(
            columns["step"], columns["distillation"], columns["mean_gate"], gates
        )
        with replaced(folder / "gates.png") as part:
            figure.savefig(part, format="png")


def _identity(trainer: GateTrainer) -> dict[str, Any]:
    """What a training must have in common with the one that it goes on with."""
    said = json.loads(json.dumps(dataclasses.asdict(trainer.settings)))
    kept = {name: value for name, value in said.items() if name not in _FREE}
    return kept | {"weights": trainer.lm.fingerprint()}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    try:
        saved = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no training of gates to resume") from error
    except ValueError as error:
        raise ValueError(f"{folder / _SETTINGS} is damaged: {error}") from error
    if saved != settings:
        names = sorted(n for n in saved | settings if saved.get(n) != settings.get(n))
        listed = "\n".join(f"  {n}: {saved.get(n)} there, {settings.get(n)} here" for n in names)
        raise ValueError(
            f"{folder} holds a training of other settings:\n{listed}\n"
            "Resume it with those, or train anew into another folder (--out)"
        )
