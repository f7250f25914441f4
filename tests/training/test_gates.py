"""Gates against the models that they lie between, finite differences, and an undisturbed run."""

import csv
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax import FullCache, LanguageModel, SinkRing
from sinkjax.caches import read_gates
from sinkjax.models import Decoder, Rotary
from sinkjax.models.positions import Alibi
from sinkjax.train import read_config
from sinkjax.training import GateTrainer, GateTraining, PasskeyRows, Passkeys, train_gates
from sinkjax.training.gates import FullView, MixedView, two_passes
from tests import oracle
from tests.conftest import ROOT, byte_tokenizer, python, tiny_decoder
from tests.processes import run_python

T, SINKS, RECENT = 128, 2, 14
TASK = Passkeys(count=1, words=2)
SETTINGS = GateTraining(
    model="tiny",
    lengths=(T,),
    steps=6,
    learning_rate=0.2,
    sinks=SINKS,
    recent=RECENT,
    task=TASK,
    save_every=2,
)


@functools.cache
def tiny() -> LanguageModel:
    return LanguageModel(tiny_decoder(258), byte_tokenizer())


@functools.cache
def changed(**changes) -> Decoder:
    """Random weights, the same for the same changes to the config."""
    return Decoder(dataclasses.replace(tiny().config, **changes), rngs=nnx.Rngs(0))


def trainer(lm: LanguageModel | None = None, **changes) -> GateTrainer:
    hay = np.random.default_rng(0).integers(0, 256, 2000)
    encode = functools.partial(byte_tokenizer().encode, add_bos=False)
    settings = dataclasses.replace(SETTINGS, **changes)
    return GateTrainer(lm or tiny(), settings, PasskeyRows(TASK, hay, encode))


def passes(model, gates, tokens):
    run = jax.jit(lambda gates, tokens: two_passes(model, gates, tokens, SINKS, RECENT))
    return run(gates, tokens)


def hidden(model, policy, tokens):
    caches = model.init_caches(policy, batch=len(tokens))
    return jax.jit(lambda tokens: model(tokens, caches)[0])(tokens)


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 258, (rows, T)).astype(np.int32)


@pytest.mark.parametrize("layers_with_a_window", [None, (True, False)])
def test_the_ends_are_models_that_are_there_already(layers_with_a_window):
    window = 8 if layers_with_a_window else None  # shorter than that of the streaming view
    model = changed(sliding_window=window, local_layers=layers_with_a_window)
    tokens = tokens_of(2)
    dense = hidden(model, FullCache(T), tokens)
    streaming = hidden(model, SinkRing(SINKS, RECENT, "absolute"), tokens)
    # Hidden states are of size 1; the caches' kernels sum in another order.
    for gate, expected in ((1, dense), (0, streaming)):
        full, mixed = passes(model, np.full((2, 2), gate, np.float32), tokens)
        np.testing.assert_allclose(full, dense, atol=1e-5)
        np.testing.assert_allclose(mixed, expected, atol=1e-5)
        assert (full == mixed).all() == (gate == 1)
    assert np.abs(dense - streaming).max() > 0.1


def test_each_head_is_mixed_by_its_own_gate():
    """In the first layer, whose queries, keys and values are the same in both passes."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, h, 8)).astype(np.float32) for h in (4, 2, 2))
    gate = np.array([0.3, 0.9], np.float32)
    _, seen = FullView().attend(q, k, v, Rotary(8))
    out, _ = MixedView(jnp.asarray(gate), seen.out, policy=(3, 5)).attend(q, k, v, Rotary(8))
    full, streaming = (
        oracle.attention(
            q[0],
            k[0],
            v[0],
            sinks=sinks,
            window=window,
            positions="absolute",
            theta=oracle.frequencies(8, 10_000.0),
        )
        for sinks, window in ((0, None), (3, 5))
    )
    share = np.repeat(gate, 2)[:, None]
    np.testing.assert_allclose(out[0], share * full + (1 - share) * streaming, atol=1e-5)


@pytest.mark.parametrize("remat", [True, False])
def test_the_gradient(remat):
    made = trainer(remat=remat)
    tokens, answers = made.batch(0)
    gates = np.array([[0.7, 0.4], [0.2, 0.5]], np.float32)
    (loss, distillation), gradient = jax.tree.map(np.asarray, made.gradient(gates, tokens, answers))
    assert loss == pytest.approx(distillation + 0.05 * gates.mean(), rel=1e-6)
    full, mixed = (np.float64(x) for x in passes(tiny().model, gates, tokens))
    expected = ((full - mixed) ** 2).mean(axis=-1)[answers].mean()
    assert distillation == pytest.approx(expected, rel=1e-5)
    # Float32 rounds the loss to 1e-8, and so these differences to 1e-5 of them.
    for i, j in np.ndindex(2, 2):
        step = np.zeros_like(gates)
        step[i, j] = 0.01
        (above, _), _ = made.gradient(gates + step, tokens, answers)
        (below, _), _ = made.gradient(gates - step, tokens, answers)
        slope = float(above - below) / 0.02
        assert gradient[i, j] == pytest.approx(slope, rel=1e-3), (i, j)


def test_training_lowers_the_loss():
    """Below that of gates that are all 1, which is the weight of the mean gate alone, and below
    that of gates that are all 0."""
    made = trainer(steps=25, learning_rate=0.1, l1=0.2)
    list(made.steps())
    batches = [made.batch(step) for step in range(100, 110)]

    def loss(gates) -> float:
        return np.mean([float(made.gradient(gates, *batch)[0][0]) for batch in batches])

    trained, ends = loss(made.gates), [loss(np.full((2, 2), x, np.float32)) for x in (0, 1)]
    assert ends[1] == pytest.approx(0.2, rel=1e-6)
    assert trained < 0.95 * min(ends)


def test_heads_that_need_nothing_far_away_end_at_zero():
    made = trainer(recent=T, learning_rate=0.3)  # the window sees everything
    metrics = list(made.steps())
    np.testing.assert_array_equal(made.gates, 0)
    assert max(m.distillation for m in metrics) < 1e-10
    rates = [m.learning_rate for m in trainer(recent=T, steps=10).steps()]
    shares = [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]
    np.testing.assert_allclose(rates, np.multiply(shares, 0.2), rtol=1e-6)


def test_a_resumed_training_is_the_undisturbed_one_bit_for_bit(tmp_path):
    gates = train_gates(trainer(), tmp_path / "whole")
    np.testing.assert_allclose(read_gates(tmp_path / "whole" / "gates"), gates, atol=1e-6)
    settings = json.loads((tmp_path / "whole" / "gates" / "config.json").read_text())
    assert settings == {"sink_size": SINKS, "recent_size": RECENT}
    assert (tmp_path / "whole" / "gates.png").read_bytes().startswith(b"\x89PNG")

    def killed(metrics):
        if metrics.step == 4:  # one after a checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_gates(trainer(), tmp_path / "cut", progress=killed)
    seen = []
    again = train_gates(trainer(), tmp_path / "cut", resume=True, progress=seen.append)
    assert [m.step for m in seen] == [4, 5]
    np.testing.assert_array_equal(again, gates)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    assert len(read_metrics(tmp_path / "cut")) == 7
    finished = train_gates(trainer(), tmp_path / "cut", resume=True, progress=seen.append)
    np.testing.assert_array_equal(finished, gates)
    assert len(seen) == 2


def read_metrics(folder: Path) -> list[list[str]]:
    """Without the last column, seconds."""
    return [row[:-1] for row in csv.reader((folder / "metrics.csv").read_text().splitlines())]


def test_a_training_of_other_settings_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no training of gates to resume"):
        train_gates(trainer(), tmp_path, resume=True)
    train_gates(trainer(steps=1), tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="holds a training of gates already: resume it"):
        train_gates(trainer(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"other settings:\n  l1: 0.05 there, 0.1 here\n  seed:"):
        train_gates(trainer(steps=1, l1=0.1, seed=3), tmp_path, resume=True)
    other = LanguageModel(tiny_decoder(258, seed=1), byte_tokenizer())
    with pytest.raises(ValueError, match="other settings:\n  weights: "):
        train_gates(trainer(other, steps=1), tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    train_gates(trainer(steps=1, model="elsewhere", save_every=9), tmp_path, resume=True)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        train_gates(trainer(steps=1), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps must be ≥ 1, got 0"),
        (dict(lengths=()), "lengths must be some, each ≥ 1"),
        (dict(recent=0), "recent must be ≥ 1, got 0"),
        (dict(l1=float("nan")), "l1 must be ≥ 0, got nan"),
        (dict(learning_rate=0.0), "learning_rate must be > 0, got 0.0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_models_with_alibi_are_refused():
    lm = LanguageModel(changed(alibi=Alibi()), byte_tokenizer())
    with pytest.raises(ValueError, match="can't be trained for a model with ALiBi"):
        trainer(lm)


def test_models_with_rearranged_heads_are_refused():
    grouped = changed(norm_eps=2e-5).grouped(np.array([[False, True]] * 2))
    with pytest.raises(ValueError, match="heads in the order of the checkpoint: load the model"):
        trainer(LanguageModel(grouped, byte_tokenizer()))


SPREAD = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from sinkjax import LanguageModel, make_mesh
from sinkjax.models import Decoder
from tests.conftest import byte_tokenizer
from tests.training.test_gates import tiny, trainer

gates = np.array([[0.7, 0.4], [0.2, 0.5]], np.float32)
(alone, _), expected = (made := trainer(batch=2)).gradient(gates, *made.batch(0))
weights = {n: np.asarray(x) for n, x in tiny().model.weights().items()}
for spec in ("data=2", "model=4", "data=2,model=2"):
    mesh = make_mesh(spec)
    model = Decoder.from_weights(tiny().config, weights, mesh=mesh)
    lm = LanguageModel(model, byte_tokenizer(), mesh=mesh)
    (loss, _), found = (made := trainer(lm, batch=2)).gradient(gates, *made.batch(0))
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    made.train_step()
    assert made.gates.shape == (2, 2)
try:
    trainer(lm, batch=3)
except ValueError as error:
    print(error)
"""


def test_on_a_mesh():
    """Rows over `data`, heads over `model`, fewer KV heads than devices too."""
    (end,) = run_python([["-c", SPREAD]], timeout=120)
    assert end.code == 0, end.err
    assert "a batch of 3 rows does not divide over 2 devices" in end.out


def test_the_command(tmp_path, tiny_folder):
    (tmp_path / "hay.txt").write_text("All that is gold does not glitter. " * 60)
    config = tmp_path / "small.py"
    config.write_text(
        "from sinkjax.training import GateTraining, Passkeys\n"
        f"task = Passkeys(count=1, words=2, text={str(tmp_path / 'hay.txt')!r}, tokens=1500)\n"
        f"CONFIG = GateTraining({str(tiny_folder)!r}, (128, 160), steps=3, task=task)\n"
    )
    out = tmp_path / "run"
    arguments = ["-m", "sinkjax.train", "gates", "--config", config, "--out", out]
    done = python(*arguments)
    assert done.returncode == 0, done.stderr.decode()
    assert b"gates of 4 heads, contexts of 128 to 160 tokens" in done.stdout
    assert read_gates(out / "gates").shape == (2, 2)
    again = python(*arguments, "--dtype", "bfloat16", "--resume")
    assert again.returncode == 2
    assert b"dtype: float32 there, bfloat16 here" in again.stderr


def test_the_shipped_configs():
    found = {path.stem: read_config(str(path)) for path in (ROOT / "configs").glob("*.py")}
    assert {"duo_smollm2", "duo_llama3_8b"} <= found.keys()


def test_wrong_configs(tmp_path):
    for text, message in (
        ("x = 1", "must define CONFIG, a GateTraining, and has NoneType"),
        ("1 / 0", "does not run: ZeroDivisionError"),
    ):
        (tmp_path / "c.py").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(str(tmp_path / "c.py"))
    with pytest.raises(FileNotFoundError, match="no config at"):
        read_config(str(tmp_path / "none.py"))
