"""Passkeys and needles: where they lie, what counts as known, and the commands."""

import csv
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import CacheFull, FullCache, Sampling, SinkRing, Stream, evaluate
from sinkjax.analysis import (
    Grid,
    Prompt,
    needle_prompts,
    passkey_prompts,
    recall_by_reading,
    recall_by_writing,
)
from sinkjax.analysis.haystack import NATO
from sinkjax.analysis.passkey import contains, words_known
from tests.conftest import python
from tests.test_evaluate import png_size, rows_of


def encode(text: str) -> list[int]:
    return list(text.encode("ascii"))


# Letters and spaces: no word of a key is in it, but by chance.
LETTERS = b"abcdefghijklmnopqrstuvwxyz  "
HAYSTACK_IDS = np.random.default_rng(0).choice(list(LETTERS), 3000).tolist()
HAYSTACK = bytes(HAYSTACK_IDS)
PASSKEY = rb"\n\nRemember: the (passkey of \w+ is)((?: \w+)+)\.\n\n"
NEEDLE = rb"\n\nThe (secret of the soup of \w+ is)( \w+ and \w+)\.\n\n"


def check(prompt: Prompt, hidden: bytes, question: str, others: int) -> None:
    """A prompt is a stretch of the haystack with sentences in it, then a question for one."""
    assert prompt.token_ids.dtype == np.int32 and len(prompt.token_ids) == prompt.length
    text = bytes(prompt.token_ids.tolist())
    assert text[0] == 7
    sentence = re.compile(hidden).match(text, prompt.hidden_at)
    same, answer = (group.decode() for group in sentence.groups())
    assert answer == prompt.text == bytes(prompt.answer_ids.tolist()).decode()
    assert [bytes(word).decode() for word in prompt.answer] == re.findall(" [a-z]+", answer)
    asked = question.format(same).encode()
    assert text.endswith(asked)
    assert (text + answer.encode()).count(answer.encode()) == 2
    before = re.sub(hidden, b"", text[1 : prompt.hidden_at])
    stretch = re.sub(hidden, b"", text[1 : -len(asked)])
    assert stretch in HAYSTACK and len(before) == round(prompt.depth * len(stretch))
    assert len(re.findall(hidden, text)) == 1 + others


@pytest.mark.parametrize("keys", [1, 3])
def test_a_passkey_lies_where_it_should(keys):
    asked = dict(lengths=[400, 900], depths=[0, 0.3, 1], samples=2, words=3, seed=5, start=[7])
    prompts = passkey_prompts(encode, HAYSTACK_IDS, keys=keys, **asked)
    cells = [(p.length, p.depth, p.sample) for p in prompts]
    assert cells == [(n, d, i) for n in (400, 900) for d in (0, 0.3, 1) for i in (0, 1)]
    for prompt in prompts:
        check(prompt, PASSKEY, "\n\nNow say: the {}", keys - 1)
        assert set(prompt.text.split()) <= set(NATO) and len(prompt.answer) == 3
    assert len({p.text for p in prompts}) == len(prompts)


def test_a_needle_lies_where_it_should():
    asked = dict(lengths=[400, 700], depths=[0, 0.5, 1], seed=5, start=[7])
    for prompt in needle_prompts(encode, HAYSTACK_IDS, **asked):
        question = "\n\nQuestion: What is the {}?\nAnswer: The {}"
        text = bytes(prompt.token_ids.tolist()).decode()
        same = text.rpartition("Answer: The ")[2]
        assert text.endswith(question.format(same.removesuffix(" is"), same))
        check(prompt, NEEDLE, f"\n\nQuestion: What is the {same[:-3]}?\nAnswer: The {{}}", 0)


def test_a_prompt_depends_on_its_own_cell_alone():
    asked = dict(lengths=[300, 400], depths=[0.2, 0.7], samples=3, words=4)
    every = passkey_prompts(encode, HAYSTACK_IDS, **asked)
    one = passkey_prompts(
        encode, HAYSTACK_IDS, **{**asked, "lengths": [400], "depths": [0.7], "samples": 2}
    )
    for found, again in zip(one, every[-3:], strict=False):
        assert dataclasses.replace(found, token_ids=0) == dataclasses.replace(again, token_ids=0)
        np.testing.assert_array_equal(found.token_ids, again.token_ids)
    other = passkey_prompts(encode, HAYSTACK_IDS, **asked, seed=1)
    assert not {p.text for p in every} & {p.text for p in other}


def test_an_answer_is_never_in_the_text_by_chance():
    few = list(" ".join(NATO[:-1] * 20).encode())
    asked = dict(lengths=[800], depths=[0.5], samples=3, words=1)
    for prompt in passkey_prompts(encode, few, **asked):
        assert prompt.text == " zulu"
    with pytest.raises(ValueError, match="the text has the answers by itself"):
        passkey_prompts(encode, list(" ".join(NATO * 20).encode()), **asked)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(words=0), "words must be ≥ 1, got 0"),
        (dict(keys=0), "keys must be ≥ 1, got 0"),
        (dict(samples=0), "samples must be ≥ 1, got 0"),
        (dict(seed=-1), "seed must be ≥ 0, got -1"),
        (dict(lengths=[]), r"lengths must be some, each once, got \[\]"),
        (dict(depths=[0.5, 0.5]), "depths must be some, each once"),
        (dict(depths=[0, 1.5]), r"share of the text, in \[0, 1\], got 1.5"),
        (dict(lengths=[60]), "60 tokens are .* too few for what is hidden"),
        (dict(lengths=[9000]), "a length of 9000 needs a text of .* tokens, and it has 3000"),
    ],
)
def test_prompts_refuse(wrong, message):
    with pytest.raises(ValueError, match=message):
        passkey_prompts(
            encode, HAYSTACK_IDS, **{"lengths": [400], "depths": [0], "words": 2, **wrong}
        )


# What counts


def made(answer, text="", **cell) -> Prompt:
    cell = {"length": 3, "depth": 0.0, "sample": 0, **cell}
    return Prompt(np.array([1, 2, 3], np.int32), answer, text, 0, **cell)


@pytest.mark.parametrize(
    ("expected", "share"),
    [
        ([5, 6, 7, 8, 9], 1),
        ([5, 6, 0, 8, 9], 2 / 3),
        ([5, 0, 7, 8, 0], 1 / 3),
        ([0, 6, 0, 0, 9], 0),
    ],
)
def test_a_word_counts_when_all_of_it_is_known(expected, share):
    assert words_known(made(((5, 6), (7,), (8, 9))), np.array(expected)) == pytest.approx(share)


def test_an_answer_may_be_part_of_what_is_said():
    assert contains("Well: Sage and MINT, I think", " sage and mint")
    assert not contains("sage or mint", " sage and mint")


def test_a_grid_is_the_mean_of_its_samples():
    cells = [(n, d, i) for n in (10, 20) for d in (0.0, 0.5, 1.0) for i in (0, 1)]
    prompts = [made((), length=n, depth=d, sample=i) for n, d, i in cells]
    grid = Grid.of(prompts, np.arange(12) / 12)
    assert (grid.lengths, grid.depths) == ((10, 20), (0.0, 0.5, 1.0))
    np.testing.assert_allclose(grid.recall * 12, [[0.5, 6.5], [2.5, 8.5], [4.5, 10.5]])
    assert grid.mean == pytest.approx(5.5 / 12)


def known(byte_lm) -> list[Prompt]:
    """Prompts whose answers a random model says in part: words that it wrote, some of them bent."""
    prompts = passkey_prompts(encode, HAYSTACK_IDS, lengths=[150, 201], depths=[0.1, 0.9], words=2)
    out = []
    stream = Stream(byte_lm, cache=SinkRing(2, 300), sampling=Sampling(), ignore_eos=True)
    for number, prompt in enumerate(prompts):
        stream.reset()
        stream.feed([prompt.token_ids.tolist()])
        drawn = [out.tokens[0] for (out,) in stream.run(6)]
        for place in range(number % 3):
            drawn[2 * place + 1] = (drawn[2 * place + 1] + 1) % 256
        out.append(dataclasses.replace(prompt, answer=tuple(zip(*[iter(drawn)] * 2, strict=True))))
    return out


def test_reading_a_full_cache_is_one_dense_pass(byte_lm):
    prompts = known(byte_lm)
    model, expected = byte_lm.model, []

    @jax.jit
    def logits(ids):
        return model.logits(model(ids, model.init_caches(FullCache(207)))[0])[0]

    for prompt in prompts:
        ids = np.zeros((1, 207), np.int32)
        ids[0, : prompt.length + 6] = *prompt.token_ids, *prompt.answer_ids
        said = np.asarray(logits(ids)).argmax(-1)[prompt.length - 1 :][:6]
        expected.append(np.mean((said == prompt.answer_ids).reshape(3, 2).all(-1)))
    assert {0, 1} & set(expected) and len(set(expected)) > 1
    for policy, chunk in ((FullCache(206), 32), (SinkRing(2, 300), 7)):
        found = recall_by_reading(byte_lm, prompts, policy, chunk=chunk)
        np.testing.assert_allclose(found, expected)
    with pytest.raises(CacheFull, match="would hold 206"):
        recall_by_reading(byte_lm, prompts, FullCache(205))


def test_writing_is_what_a_stream_says(byte_lm):
    prompts, done = known(byte_lm), []
    for number, prompt in enumerate(prompts):
        stream = byte_lm.stream(prompt.token_ids.tolist(), cache=SinkRing(2, 60), max_tokens=9)
        said = "".join(stream)
        assert len(said) > 5
        prompts[number] = dataclasses.replace(prompt, text=said[1:4] + "?!" * (number % 2))
    found = recall_by_writing(byte_lm, prompts, SinkRing(2, 60), spare=3, progress=done.append)
    assert list(found) == [1, 0, 1, 0] and done == [150, 150, 201, 201]
    with pytest.raises(CacheFull, match="would hold 210"):
        recall_by_writing(byte_lm, prompts, FullCache(209), spare=3)
    with pytest.raises(ValueError, match="spare must be ≥ 0"):
        recall_by_writing(byte_lm, prompts, SinkRing(2, 60), spare=-1)


@pytest.mark.parametrize(
    "policy", [SinkRing(2, 30), FullCache(9, "bfloat16"), FullCache(9, "int4")]
)
def test_bytes_of_a_cache(byte_lm, policy):
    """On a CPU, int4 takes a byte each: on the devices that it is for, half."""
    leaves = jax.tree.leaves(byte_lm.init_caches(policy))
    fours = sum(x.size for x in leaves if x.dtype == jnp.int4)
    assert byte_lm.cache_bytes(policy) == sum(x.nbytes for x in leaves) - fours // 2


# The commands


@pytest.fixture(scope="module")
def flags(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("passkey")
    (folder / "text.txt").write_bytes(HAYSTACK)
    return ["--model", tiny_folder, "--text", folder / "text.txt", "--out", folder / "out"]


@pytest.mark.parametrize(("kind", "own"), [("passkey", ["--words=3", "--keys=2"]), ("needle", [])])
def test_end_to_end(byte_lm, flags, kind, own):
    sizes = ["--lengths=300,400", "--depths=0,0.5,1", "--samples=2", "--chunk=64", "--seed=3"]
    caches = ["--cache=full", "--cache=ring:2+30,int8"]
    done = python("-m", "sinkjax.evaluate", kind, *flags, *sizes, *own, *caches)
    assert done.returncode == 0, done.stderr.decode()
    assert "12 prompts of 300, 400 tokens" in done.stdout.decode()
    rows = rows_of(flags[-1] / f"{kind}.csv")
    assert len(rows) == 2 * 12 and {row["cache"] for row in rows} == {"full", "ring:2+30,int8"}
    assert [row["length"] for row in rows[:12]] == ["300"] * 6 + ["400"] * 6
    assert all(0 <= float(row["recall"]) <= 1 for row in rows)
    full, ring = rows_of(flags[-1] / f"{kind}_summary.csv")
    asked = dict(lengths=[300, 400], depths=[0, 0.5, 1], samples=2, seed=3)
    if kind == "passkey":
        prompts = passkey_prompts(encode, HAYSTACK_IDS, **asked, words=3, keys=2)
        room = max(p.length + len(p.answer_ids) for p in prompts)
        expected = recall_by_reading(byte_lm, prompts, FullCache(room), chunk=64)
    else:
        prompts = needle_prompts(encode, HAYSTACK_IDS, **asked)
        room = max(p.length + len(p.answer_ids) for p in prompts) + 8
        expected = recall_by_writing(byte_lm, prompts, FullCache(room), chunk=64)
    np.testing.assert_allclose([float(row["recall"]) for row in rows[:12]], expected, atol=1e-6)
    assert float(full["recall"]) == pytest.approx(expected.mean(), rel=1e-3)
    assert int(full["cache_bytes"]) == byte_lm.cache_bytes(FullCache(room))
    assert int(ring["cache_bytes"]) == byte_lm.cache_bytes(SinkRing(2, 30, kv_dtype="int8"))
    assert min(png_size(flags[-1] / f"{kind}.png")) > 400


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("needle", "--words=3", "--words belongs to passkey, not to needle"),
        ("passkey", "--tokens=3", "--tokens belongs to perplexity, not to passkey"),
        ("passkey", "--lengths=many", "--lengths must be numbers, such as"),
        ("passkey", "--lengths=", "lengths must be some"),
        ("passkey", "--cache=ring:4", "cache policy 'ring:4' needs SINKS+WINDOW"),
        ("passkey", "--cache=full:9", "the FullCache of 9 tokens is full"),
    ],
)
def test_what_is_wrong_is_said(flags, kind, wrong, message):
    done = python("-m", "sinkjax.evaluate", kind, *flags, wrong, "--depths=0")
    assert done.returncode == 2 and not (flags[-1] / f"{kind}_x").exists()
    assert message in done.stderr.decode()


def test_files(tmp_path):
    prompts = [made((), length=n, depth=d) for n in (10, 20) for d in (0.0, 1.0)]
    marks = {"full": np.array([1, 1, 1, 0.5]), "ring:4+8,int8": np.array([0, 1, 0, 0.25])}
    sizes = {"full": 800, "ring:4+8,int8": 99}
    summary = evaluate.save_grids("needle", prompts, marks, sizes, tmp_path)
    assert summary[1:] == [("full", "0.875", "0.5", 800), ("ring:4+8,int8", "0.3125", "0", 99)]
    with open(tmp_path / "needle.csv", newline="") as file:
        assert list(csv.reader(file))[4:6] == [
            ["full", "20", "1.0", "0", "0.5"],
            ["ring:4+8,int8", "10", "0.0", "0", "0"],
        ]
    assert png_size(tmp_path / "needle.png")[0] > 1000
    assert len(list(tmp_path.iterdir())) == 3
