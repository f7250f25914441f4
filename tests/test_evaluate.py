"""The evaluations against one token at a time, and against a stream that draws."""

import csv
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from sinkjax import CacheFull, FullCache, LanguageModel, Sampling, SinkRing, Stream, evaluate
from sinkjax.analysis import (
    Curve,
    Recall,
    Task,
    load_text,
    perplexity_curves,
    stream_recall,
    text_ids,
)
from sinkjax.analysis.perplexity import bucketed, spread
from sinkjax.analysis.streameval import grade, script
from sinkjax.models import Config, Decoder

SINKS, WINDOW, N = 2, 6, 41
TOLERANCE = 1e-5  # float32, nats; other shapes of chunk sum in another order


@functools.cache
def tiny() -> LanguageModel:
    config = Config(
        family="llama",
        vocab_size=128,
        hidden_size=24,
        intermediate_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_base=1e4,
        trained_context=16,
    )
    return LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), name="tiny")


@functools.cache
def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 128, N + 1)


@functools.cache
def curves() -> dict[str, Curve]:
    return perplexity_curves(
        tiny(), token_ids(), sinks=SINKS, window=WINDOW, chunk=5, recompute_samples=0
    )


@functools.cache
def forward():
    graph, params = nnx.split(tiny().model)

    @jax.jit
    def step(tokens, caches):
        model = nnx.merge(graph, params)
        hidden, caches = model(tokens, caches)
        return model.logits(hidden[:, -1]), caches

    return step


def surprise(logits, token) -> float:
    x = np.asarray(logits, np.float64)[0]
    return np.log(np.exp(x - x.max()).sum()) + x.max() - x[token]


@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        ("dense", FullCache(N)),
        ("window", SinkRing(0, SINKS + WINDOW)),
        ("streaming", SinkRing(SINKS, WINDOW)),
    ],
)
def test_a_curve_is_what_one_token_at_a_time_gives(mode, policy):
    ids, caches, expected = token_ids(), tiny().model.init_caches(policy), []
    for now, then in zip(ids[:-1], ids[1:], strict=True):
        logits, caches = forward()(jnp.asarray([[now]]), caches)
        expected.append(surprise(logits, then))
    curve = curves()[mode]
    np.testing.assert_array_equal(curve.positions, np.arange(N))
    np.testing.assert_allclose(curve.nll, expected, atol=TOLERANCE)
    assert curve.perplexity == pytest.approx(np.exp(np.mean(expected)), rel=TOLERANCE)
    assert curve.tokens_per_second > 0


def test_other_caches_have_curves_of_their_own():
    others = {"ring:2+6": SinkRing(SINKS, WINDOW), "full": FullCache(N)}
    for modes in ([], ["window"]):
        found = perplexity_curves(
            tiny(), token_ids(), sinks=SINKS, window=WINDOW, modes=modes, caches=others, chunk=5
        )
        assert list(found) == [*modes, *others]
        for name, same in {"ring:2+6": "streaming", "full": "dense"}.items():
            np.testing.assert_array_equal(found[name].nll, curves()[same].nll)
    with pytest.raises(ValueError, match="'dense' is the name of a mode"):
        perplexity_curves(tiny(), token_ids(), modes=[], caches={"dense": FullCache(N)})
    with pytest.raises(CacheFull, match="would hold 41"):
        perplexity_curves(tiny(), token_ids(), modes=[], caches={"a": FullCache(N - 1)})


def test_recompute_encodes_each_window_from_scratch():
    ids, size = token_ids(), SINKS + WINDOW
    curve = curves()["recompute"]
    np.testing.assert_array_equal(curve.positions, np.arange(N))
    for t in (0, 4, size - 1, size, size + 1, N - 1):
        part = ids[max(0, t + 1 - size) : t + 1]
        logits, _ = forward()(jnp.asarray(part[None]), tiny().model.init_caches(FullCache(size)))
        assert curve.nll[t] == pytest.approx(surprise(logits, ids[t + 1]), abs=TOLERANCE)


def test_modes_agree_until_the_cache_is_full_and_not_after():
    dense = curves()["dense"].nll
    for mode in ("window", "recompute", "streaming"):
        apart = np.abs(curves()[mode].nll - dense)
        assert apart[: SINKS + WINDOW].max() < TOLERANCE
        assert apart[SINKS + WINDOW :].max() > 1e-3


def test_recompute_scores_samples_as_it_scores_all():
    some = perplexity_curves(
        tiny(), token_ids(), sinks=SINKS, window=WINDOW, modes=["recompute"], recompute_samples=7
    )["recompute"]
    np.testing.assert_array_equal(some.positions, spread(7, N))
    every = curves()["recompute"].at(some.positions)
    np.testing.assert_allclose(some.nll, every.nll, atol=TOLERANCE)


@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (1, 9), (7, 41), (40, 41), (99, 41)])
def test_samples_are_spread_evenly(samples, tokens):
    found = spread(samples, tokens)
    assert len(found) == min(samples, tokens)
    assert found[0] >= 0 and found[-1] < tokens
    gaps = np.diff(found)
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_buckets_part_a_curve():
    curve = Curve(np.array([0, 3, 4, 9]), np.log(np.array([2.0, 8.0, 5.0, 7.0])), 1.0)
    found = [(list(b.positions), round(b.perplexity, 6)) for b in curve.buckets(4)]
    assert found == [([0, 3], 4.0), ([4], 5.0), ([9], 7.0)]


def test_a_guide_fills_in_what_was_not_sampled():
    guide = Curve(np.arange(6), np.array([1.0, 2.0, 6.0, 1.0, 1.0, 4.0]), 1.0)
    whole = Curve(np.arange(6), guide.nll + np.array([0.5] * 3 + [-0.5] * 3), 1.0)
    some = whole.at(np.array([0, 5]))
    for curve in (whole, some):
        x, y = bucketed(curve, 3, guide)
        np.testing.assert_allclose(x, [1, 4])
        np.testing.assert_allclose(np.log(y), [3.5, 1.5])
    np.testing.assert_allclose(np.log(bucketed(some, 3)[1]), [1.5, 3.5])


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_perplexity_files(tmp_path):
    found = dict(curves())
    found["recompute"] = found["recompute"].at(np.array([1, 20, 40]))
    summary = evaluate.save_perplexity(found, tmp_path / "new", bucket=16, trained_context=16)
    tokens = rows_of(tmp_path / "new" / "perplexity.csv")
    assert tokens[0].keys() == {"position", "mode", "nll"}
    for mode, curve in found.items():
        mine = [row for row in tokens if row["mode"] == mode]
        assert [int(row["position"]) for row in mine] == list(curve.positions)
        assert [np.float32(row["nll"]) for row in mine] == list(curve.nll)

    rows = {row["mode"]: row for row in rows_of(tmp_path / "new" / "summary.csv")}
    assert list(rows) == [row[0] for row in summary[1:]] == [*found, "streaming_at_samples"]
    assert [int(row["tokens"]) for row in rows.values()] == [N, N, 3, N, 3]
    nll = found["streaming"].nll
    same = dict(rel=1e-4)
    assert float(rows["streaming"]["perplexity"]) == pytest.approx(np.exp(nll.mean()), **same)
    last = float(rows["streaming"]["perplexity_last_bucket"])
    assert last == pytest.approx(np.exp(nll[32:].mean()), **same)
    there = float(rows["streaming_at_samples"]["perplexity"])
    assert there == pytest.approx(np.exp(nll[[1, 20, 40]].mean()), **same)
    assert png_size(tmp_path / "new" / "perplexity.png") == (1440, 800)
    assert len(list((tmp_path / "new").iterdir())) == 3


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5_000
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    evaluate.write_table(tmp_path / "t.csv", [("a", "b"), (1, "x,y")])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n1,"x,y"\n'
    with pytest.raises(ZeroDivisionError):
        evaluate.write_table(tmp_path / "t.csv", ((1 // 0,) for _ in range(1)))
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n1,"x,y"\n'
    assert len(list(tmp_path.iterdir())) == 1


def test_texts_are_joined_by_name(tmp_path):
    for name, content in {"b.txt": "two\r\n", "a.txt": "één", ".hidden": "no"}.items():
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "folder").mkdir()
    assert load_text(str(tmp_path)) == "één\n\ntwo\r\n"
    assert load_text(str(tmp_path / "b.txt")) == "two\r\n"


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no text at .*missing"):
        load_text(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="no text at"):
        load_text(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 \(byte 1\)"):
        load_text(str(tmp_path))


class Words:
    """One token a word; with it, as with BPE, a cut changes the last token alone."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def test_a_text_is_cut_to_what_is_needed():
    text = " ".join("x" * (i % 50 + 1) for i in range(3000))
    for count in (1, 100, 2999, 3000):
        np.testing.assert_array_equal(text_ids(text, Words(), count), Words().encode(text)[:count])
    with pytest.raises(ValueError, match="has 3000 tokens .*, 3001 are needed"):
        text_ids(text, Words(), 3001)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(modes=["dense", "sparse"]), "some of dense, window.* got dense, sparse"),
        (dict(modes=["dense", "dense"]), "each once"),
        (dict(modes=[]), "got none"),
        (dict(window=0), "window must be ≥ 1, got 0"),
        (dict(sinks=-1), "sinks must be ≥ 0, got -1"),
        (dict(chunk=0), "chunk must be ≥ 1, got 0"),
        (dict(recompute_samples=-1), "recompute_samples must be ≥ 0, got -1"),
        (dict(token_ids=[5]), "at least two tokens"),
        (dict(token_ids=[5, 128]), "token 128 is out of range"),
    ],
)
def test_perplexity_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        perplexity_curves(tiny(), **{"token_ids": [1, 2, 3], **wrong})


def encode(text: str) -> list[int]:
    return list(text.encode("ascii"))


def test_questions_ask_what_a_line_said():
    values, asked = {}, []
    for number, head, value, is_question in script(60, every=10, back=20, seed=3):
        if is_question:
            fact = head.removeprefix("Question about ")
            assert values[fact] == value
            assert fact.startswith(f"line {number - 20}: ")
            asked.append(number)
        else:
            assert head.startswith(f"line {number}: ")
            values[head] = value
    assert asked == [30, 40, 50, 60]
    assert len(values) == 60


def test_a_task_knows_its_answers():
    task = Task.make(encode, lines=40, every=5, back=0, seed=1, start=[127])
    again = Task.make(encode, lines=40, every=5, back=0, seed=1, start=[127])
    other = Task.make(encode, lines=40, every=5, back=0, seed=2, start=[127])
    np.testing.assert_array_equal(task.token_ids, again.token_ids)
    assert bytes(task.token_ids.tolist()) != bytes(other.token_ids.tolist())
    text = bytes(task.token_ids.tolist())
    assert text[0] == 127 and list(task.lines) == [5, 10, 15, 20, 25, 30, 35, 40]
    for (start, stop), line in zip(task.spans, task.lines, strict=True):
        question = text[:start].splitlines()[-1]
        assert question.startswith(b"Question about line %d: " % line)
        assert text.count(question.removeprefix(b"Question about ") + text[start:stop]) == 2


def test_marks_are_for_whole_answers():
    task = Task.make(encode, lines=30, every=10, back=0)
    likeliest, nll = task.token_ids[1:].copy(), np.zeros(len(task.token_ids) - 1)
    likeliest[task.spans[1, 1] - 2] += 1  # the last digit of the second answer
    likeliest[task.spans[2, 0] - 2] += 1  # the token before the third: not asked for
    nll[task.spans[1, 0] - 1] = 8.0
    recall = grade(task, likeliest, nll)
    assert list(recall.correct) == [True, False, True]
    assert list(recall.nll) == [0, 2, 0]
    assert list(recall.lines) == [10, 20, 30]
    assert list(recall.tokens) == list(task.spans[:, 0])
    assert recall.accuracy == pytest.approx(2 / 3)


def recalls() -> dict[str, Recall]:
    tokens, lines = np.array([5, 9, 25]), np.array([10, 20, 30])
    right = np.array([True, False, True])
    return {"streaming": Recall(tokens, lines, right, np.array([1.0, 2.0, 3.0]))}


def test_recall_files(tmp_path):
    summary = evaluate.save_recall(recalls(), tmp_path, bucket=10, capacity=8)
    assert summary[1] == ("streaming", 3, "0.6667", "2")
    assert (tmp_path / "streameval.csv").read_text().splitlines() == [
        "mode,lines,tokens,questions,accuracy,answer_nll",
        "streaming,20,9,2,0.5,1.5",
        "streaming,30,25,1,1,3",
    ]
    assert png_size(tmp_path / "streameval.png") == (1440, 800)


def test_recall_is_what_drawing_gives():
    """Against a stream that draws each answer, on a copy of its state, then reads the right one."""
    short = Task.make(encode, lines=8, every=1, back=1)
    ids, spans = short.token_ids.copy(), short.spans
    stream = Stream(tiny(), cache=SinkRing(4, 36), sampling=Sampling(), chunk=16)
    right, start = [], 0
    for number, (first, stop) in enumerate(spans):
        stream.feed([ids[start:first]])
        _, drawn = tiny().decode(
            jax.tree.map(jnp.copy, stream.state),
            jnp.int32(stop - first),
            steps=4,
            sampling=Sampling(),
            stop_tokens=(),
        )
        if number % 2:  # a random model is never right: make what it says the right answer
            ids[first:stop] = np.asarray(drawn)[:, 0]
        right.append(np.array_equal(np.asarray(drawn)[:, 0], ids[first:stop]))
        start = first
    assert True in right and False in right
    task = Task(ids, spans, short.lines)
    settings = dict(sinks=4, window=36, modes=["streaming"], chunk=16)
    found = stream_recall(tiny(), task, **settings)["streaming"]
    assert list(found.correct) == right
    curve = perplexity_curves(tiny(), ids, **settings)["streaming"]
    expected = [curve.nll[first - 1 : stop - 1].mean() for first, stop in spans]
    np.testing.assert_allclose(found.nll, expected, atol=TOLERANCE)
    other = dict(modes=[], caches={"ring": SinkRing(4, 36)}, chunk=16)
    np.testing.assert_array_equal(stream_recall(tiny(), task, **other)["ring"].nll, found.nll)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(every=0), "every must be ≥ 1, got 0"),
        (dict(back=-1), "back must be ≥ 0, got -1"),
        (dict(seed=-1), "seed must be ≥ 0, got -1"),
        (dict(lines=20), "20 lines, every 10, 20 back: no question"),
    ],
)
def test_a_task_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        Task.make(encode, **{"lines": 100, **wrong})


def test_recall_refuses():
    task = Task.make(encode, lines=30)
    with pytest.raises(ValueError, match="some of dense, window, streaming.* got recompute"):
        stream_recall(tiny(), task, modes=["recompute"])
    with pytest.raises(ValueError, match="chunk must be ≥ 1"):
        stream_recall(tiny(), task, chunk=0)


def command(*flags: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "sinkjax.evaluate", *map(str, flags)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    """A tiny random checkpoint with one token a byte."""
    model = tmp_path / "model"
    shutil.copytree("tests/data/families/smollm2", model)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    letters = "abcdefghijklmnopqrstuvwxyzĠ"[:size]
    bpe = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(model / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("once upon a time " * 6)
    flags = ("--model", model, "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    sizes = ("--sinks=2", "--window=6", "--recompute_samples=3", "--chunk=16", "--bucket=20")
    modes = ("--modes=recompute,streaming", "--cache=ring:2+6,int8", "--cache=full")

    done = command("perplexity", *flags, *sizes, *modes, "--tokens=50")
    assert done.returncode == 0, done.stderr
    assert "the first 50 tokens of" in done.stdout and "streaming_at_samples" in done.stdout
    assert "recompute: 100%" in done.stderr
    assert len(rows_of(tmp_path / "out" / "perplexity.csv")) == 3 + 50 + 50 + 50
    assert [row["mode"] for row in rows_of(tmp_path / "out" / "summary.csv")] == [
        *("recompute", "streaming", "ring:2+6,int8", "full", "streaming_at_samples")
    ]
    assert png_size(tmp_path / "out" / "perplexity.png") == (1440, 800)


def test_the_command_says_what_is_wrong(tmp_path):
    done = command("perplexity", "--out", tmp_path / "out", "--lines=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "evaluate: --lines belongs to streameval, not to perplexity\n"
    assert not (tmp_path / "out").exists()
