"""Streams against a float64 model that shares no code with the library, and against themselves."""

import dataclasses
import gc
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from sinkjax import CacheFull, FullCache, LanguageModel, Sampling, SinkRing, Stream, nll
from tests import oracle
from tests.conftest import byte_tokenizer, python, tiny_decoder

GREEDY, RANDOM = Sampling(), Sampling(temperature=1.0, repetition_penalty=1.2)
RING = SinkRing(sinks=2, window=14)
CHUNK = 8


def logits(lm: LanguageModel, tokens, policy) -> np.ndarray:
    """A Llama over a whole sequence, in float64 numpy: the scores after each token `[T, V]`."""
    c = lm.config
    weights = {name: np.asarray(w, np.float64) for name, w in lm.model.weights().items()}

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * weight

    ring = isinstance(policy, SinkRing)
    x = weights["embed"][np.asarray(tokens)]
    for layer in range(c.layers):
        prefix = f"blocks.{layer}."
        w = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        h = norm(x, w["attention_norm"])
        seen = oracle.attention(
            *((h @ w[f"attention.{p}"]).reshape(len(h), -1, c.head_dim) for p in "qkv"),
            sinks=policy.sinks if ring else 0,
            window=policy.window if ring else None,
            positions="cache" if ring else "absolute",
            theta=oracle.frequencies(c.head_dim, c.rope_base),
        )
        x = x + seen.reshape(len(h), -1) @ w["attention.out"]
        h = norm(x, w["mlp_norm"])
        gate = h @ w["mlp.gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up"])) @ w["mlp.down"]
    return norm(x, weights["norm"]) @ weights["head"].T


def prompt(n: int, seed: int = 0, vocab: int = 97) -> list[int]:
    return np.random.default_rng([seed, n]).integers(0, vocab, n).tolist()


def new(lm, cache=RING, sampling=GREEDY, **settings) -> Stream:
    return Stream(lm, cache=cache, sampling=sampling, chunk=CHUNK, **settings)


def drawn(stream: Stream, max_tokens: int) -> list[list[int]]:
    """The tokens of each row."""
    rows = [[] for _ in stream.rows]
    for outputs in stream.run(max_tokens):
        for row, out in zip(rows, outputs, strict=True):
            row.extend(out.tokens)
    return rows


def answer(lm, tokens, max_tokens: int, **settings) -> list[int]:
    stream = new(lm, **settings)
    stream.feed([tokens])
    return drawn(stream, max_tokens)[0]


def texts(stream: Stream, max_tokens: int) -> tuple[list[str], list[list[str]]]:
    """The text of each row, and why each ended."""
    rows, ends = ["" for _ in stream.rows], [[] for _ in stream.rows]
    for outputs in stream.run(max_tokens):
        for i, out in enumerate(outputs):
            rows[i] += out.text
            ends[i] += [out.end] if out.end else []
    return rows, ends


# What is drawn


@pytest.mark.parametrize("cache", [RING, SinkRing(0, 9), FullCache(80)], ids=str)
@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_prefill_and_decode_are_the_greedy_continuation(tiny_lm, cache, n):
    tokens = answer(tiny_lm, prompt(n), 40, cache=cache)
    # One pass over it all shows, token after token, that each was the likeliest.
    expected = logits(tiny_lm, prompt(n) + tokens, cache)[n - 1 : -1]
    best = np.sort(expected, axis=-1)
    assert np.min(best[:, -1] - best[:, -2]) > 1e-4  # float32 can tell the two likeliest apart
    assert tokens == expected.argmax(axis=-1).tolist()


def test_all_streams_of_the_same_settings_share_one_trace():
    lm = LanguageModel(tiny_decoder(97))
    for n in (1, 5, CHUNK, 2 * CHUNK + 3):
        stream = new(lm, sampling=RANDOM)
        for turn in range(3):
            stream.feed([prompt(n, turn)])
            drawn(stream, 5 + turn)
    assert (lm.prefill.traces, lm.decode.traces) == (1, 1)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_steps_per_call_do_not_change_what_is_drawn(tiny_lm, sampling):
    one, eight = (
        answer(tiny_lm, prompt(11), 43, sampling=sampling, steps_per_call=steps, seeds=[5])
        for steps in (1, 8)
    )
    assert one == eight and len(one) == 43


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_rows_of_a_batch_are_streams_by_themselves(tiny_lm, sampling):
    prompts, seeds = [prompt(n) for n in (1, CHUNK, 2 * CHUNK + 3)], (7, 8, 9)
    batch = new(tiny_lm, sampling=sampling, seeds=seeds)
    batch.feed(prompts)
    alone = [
        answer(tiny_lm, p, 30, sampling=sampling, seeds=[s])
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert drawn(batch, 30) == alone


def test_the_penalty_remembers_the_prompt_too(tiny_lm):
    """With a penalty that forbids what it remembers, 64 tokens on end are all different."""
    strict = Sampling(repetition_penalty=1e6, repetition_window=64)
    tokens = prompt(3) + answer(tiny_lm, prompt(3), 61, sampling=strict)
    scores = logits(tiny_lm, tokens, RING)
    for t, token in enumerate(tokens[3:], 3):
        penalised = scores[t - 1].copy()
        old = penalised[tokens[:t]]
        penalised[tokens[:t]] = np.where(old > 0, old / 1e6, old * 1e6)
        assert token == penalised.argmax()


@pytest.mark.parametrize("cache", [RING, FullCache(100)], ids=str)
def test_the_next_turn_goes_on_from_what_was_read_and_written(tiny_lm, cache):
    stream = new(tiny_lm, cache, RANDOM, seeds=[3])
    stream.feed([prompt(9)])
    first = drawn(stream, 10)[0]
    stream.feed([prompt(5, seed=1)])
    second = drawn(stream, 20)[0]
    whole = prompt(9) + first + prompt(5, seed=1)
    assert second == answer(tiny_lm, whole, 20, cache=cache, sampling=RANDOM, seeds=[3])
    stream.reset()
    stream.feed([prompt(9)])
    assert drawn(stream, 10)[0] == first


def test_a_stream_without_end_draws_as_many_as_it_should_in_each_call(tiny_lm):
    stream = new(tiny_lm, steps_per_call=8)
    stream.feed([prompt(3)])
    assert [len(out.tokens) for (out,) in itertools.islice(stream.run(), 4)] == [8] * 4


# Compiled once, in place, for ever


def test_the_state_is_updated_in_place():
    """The compiler's own account: every byte of the state is an output's too, and what a step
    needs besides is small beside the ring."""
    lm = LanguageModel(tiny_decoder(97))
    ring = SinkRing(4, 4092)
    state = lm.init_state(ring, RANDOM, seeds=[0, 1])
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    caches = sum(x.nbytes for x in jax.tree.leaves(state.caches))
    assert caches > 0.99 * size
    memory = (
        lm.decode.lower(state, jnp.int32(1), steps=4, sampling=RANDOM, stop_tokens=(1,))
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < caches / 4


def test_a_state_that_was_given_away_is_gone(tiny_lm):
    stream = new(tiny_lm)
    for call in (lambda: stream.feed([prompt(3)]), lambda: next(stream.run())):
        before = jax.tree.leaves(stream.state.caches)
        call()
        assert all(x.is_deleted() for x in before)
        assert not any(x.is_deleted() for x in jax.tree.leaves(stream.state))


def test_a_state_holds_arrays_that_keep_their_shape_and_nothing_else(tiny_lm):
    """A Python number that changes would have the step compiled anew at every token."""
    stream = new(tiny_lm, sampling=RANDOM)
    stream.feed([prompt(20)])

    def description():
        leaves, structure = jax.tree.flatten(stream.state)
        assert all(isinstance(x, jax.Array) for x in leaves)
        return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]

    before = description()
    hash(before[0])  # all that is static can be hashed, and compared
    drawn(stream, 20)
    assert description() == before


def test_a_long_stream_takes_no_more_memory_than_a_short_one():
    """3,000 tokens; the benchmark does a million."""
    lm = LanguageModel(tiny_decoder(97))
    stream = new(lm, sampling=RANDOM, steps_per_call=10)
    stream.feed([prompt(3)])
    resident = []
    for _ in range(3):
        for _ in itertools.islice(stream.run(), 100):
            pass
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert stream.stats()["tokens_forgotten"] == 3_003 - RING.capacity
    assert lm.decode.traces == 1
    assert resident[2] < 1.01 * resident[0]


def test_flax_in_tree_mode(tiny_lm):
    """NNX is moving from graphs to trees; what is compiled here must not mind."""
    code = """
from tests.conftest import tiny_decoder
from sinkjax import LanguageModel, Sampling, SinkRing, Stream
stream = Stream(LanguageModel(tiny_decoder(97)), cache=SinkRing(2, 14), sampling=Sampling())
stream.feed([[1, 2, 3]])
print([out.tokens[0] for (out,) in stream.run(20)])
"""

    trees = python("-c", code, NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")
    assert trees.returncode == 0, trees.stderr.decode()
    assert json.loads(trees.stdout) == answer(tiny_lm, [1, 2, 3], 20)


# How streams end


@pytest.fixture(scope="module")
def said(byte_lm):
    """What the model of bytes says when nothing stops it: tokens, and its text."""
    stream = new(byte_lm, sampling=RANDOM, ignore_eos=True)
    stream.feed(["Hi"])
    tokens, text = [], ""
    for (out,) in stream.run(200):
        tokens.extend(out.tokens)
        text += out.text
    return tokens, text


def test_the_text_is_that_of_the_tokens(byte_lm, said):
    tokens, text = said
    assert text == byte_lm.tokenizer.decode(tokens)
    assert "\ufffd" in text  # bytes that are no characters are among it


def test_max_tokens(byte_lm, said):
    for steps in (1, 8):
        stream = new(byte_lm, sampling=RANDOM, ignore_eos=True, steps_per_call=steps)
        stream.feed(["Hi"])
        outputs = [out for (out,) in stream.run(21)]
        assert [t for out in outputs for t in out.tokens] == said[0][:21]
        assert "".join(out.text for out in outputs) == byte_lm.tokenizer.decode(said[0][:21])
        assert [out.end for out in outputs] == [None] * (len(outputs) - 1) + ["max_tokens"]
        more = [t for (out,) in stream.run(9) for t in out.tokens]
        assert more == said[0][21:30]


@pytest.mark.parametrize("steps", [1, 8])
def test_a_stop_token_ends_the_text_and_is_not_in_it(byte_lm, said, steps):
    tokens, _ = said
    stop = tokens[30]
    first = tokens.index(stop)
    lm = LanguageModel(byte_lm.model, byte_tokenizer(eos_ids=[stop]))
    stream = new(lm, sampling=RANDOM, steps_per_call=steps)
    stream.feed(["Hi"])
    outputs = [out for (out,) in stream.run()]
    assert [t for out in outputs for t in out.tokens] == tokens[: first + 1]
    assert outputs[-1].end == "stop_token"
    # It has been read, so that the next turn goes on behind it.
    assert stream.stats()["tokens_drawn"] == first + 1
    stream.feed(["Go on"])
    after = drawn(stream, 10)[0]
    whole = [*lm.tokenizer.encode("Hi"), *tokens[: first + 1], *lm.tokenizer.encode("Go on")]
    alone = new(lm, sampling=RANDOM, steps_per_call=steps)
    alone.feed([whole])
    assert after == drawn(alone, 10)[0]


@pytest.mark.parametrize("steps", [1, 8])
def test_a_stop_string_ends_the_text_before_it(byte_lm, said, steps):
    """One token is one byte here: a string of several always comes in pieces."""
    _, text = said
    stop = text[50:54]
    stream = new(byte_lm, sampling=RANDOM, ignore_eos=True, stop=["no such", stop])
    stream.feed(["Hi"])
    (got,), (ends,) = texts(stream, 200)
    assert (got, ends) == (text[: text.index(stop)], ["stop_string"])


def test_a_stop_string_that_only_begins_is_printed_in_the_end(byte_lm, said):
    part = byte_lm.tokenizer.decode(said[0][:60])
    stream = new(byte_lm, sampling=RANDOM, ignore_eos=True, stop=[part[-2:] + "no such"])
    stream.feed(["Hi"])
    (got,), (ends,) = texts(stream, 60)
    assert (got, ends) == (part, ["max_tokens"])


def test_a_row_that_has_ended_is_silent_while_others_go_on(byte_lm, said):
    tokens, text = said
    stop = text[20:24]
    stream = new(
        byte_lm, sampling=RANDOM, ignore_eos=True, stop=[stop], seeds=[1, 0], steps_per_call=3
    )
    stream.feed(["Oh", "Hi"])
    outputs = list(stream.run(120))
    ended = next(i for i, (_, out) in enumerate(outputs) if out.end)
    assert outputs[ended][1].end == "stop_string"
    assert all((out.text, out.tokens, out.end) == ("", (), None) for _, out in outputs[ended + 1 :])
    alone = new(byte_lm, sampling=RANDOM, ignore_eos=True, seeds=[1])
    alone.feed(["Oh"])
    assert [t for out, _ in outputs for t in out.tokens] == drawn(alone, 120)[0]
    assert outputs[-1][0].end == "max_tokens"


@pytest.mark.parametrize("cache", [RING, dataclasses.replace(RING, kv_dtype="int4")], ids=str)
def test_a_row_that_ended_before_others_goes_on_where_it_ended(byte_lm, cache):
    """Its cache holds what it said, and nothing of the time in which only others spoke."""
    tokens = answer(byte_lm, byte_lm.tokenizer.encode("Hi"), 60, sampling=RANDOM, cache=cache)
    stop = tokens[30]
    until = tokens.index(stop) + 1
    lm = LanguageModel(byte_lm.model, byte_tokenizer(eos_ids=[stop]))
    stream = new(lm, sampling=RANDOM, seeds=[1, 0], cache=cache)
    stream.feed(["Oh", "Hi"])
    first, second = drawn(stream, 60)
    assert second == tokens[:until] and len(first) != len(second)
    stream.feed(["Next", "And then?"])
    after = drawn(stream, 20)[1]
    whole = [*lm.tokenizer.encode("Hi"), *second, *lm.tokenizer.encode("And then?")]
    assert after == answer(lm, whole, 20, sampling=RANDOM, cache=cache)


def test_pieces_and_the_short_way_give_the_same_text(byte_lm, said):
    stream = Stream(byte_lm, cache=RING, sampling=RANDOM)
    stream.feed(["Hi"])
    expected = "".join(piece for (piece,) in stream.pieces(50))
    short = byte_lm.stream("Hi", cache=RING, sampling=RANDOM, max_tokens=50, steps_per_call=8)
    assert "".join(short) == expected


# What is refused


def test_a_full_cache_gives_all_that_fits_and_then_says_so(tiny_lm):
    ring = answer(tiny_lm, prompt(7), 23, cache=FullCache(100))
    for steps in (1, 8):
        stream = new(tiny_lm, FullCache(30), steps_per_call=steps)
        stream.feed([prompt(7)])
        got = []
        with pytest.raises(CacheFull, match="FullCache of 30 tokens is full.*SinkRing"):
            for (out,) in stream.run():
                got.extend(out.tokens)
        assert got == ring
    with pytest.raises(CacheFull):
        stream.feed([[1]])
    with pytest.raises(CacheFull):
        new(tiny_lm, FullCache(30)).feed([prompt(31)])


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("most", [0, 24])
def test_a_row_with_a_full_cache_ends_alone(tiny_lm, steps, most):
    """The shorter rows of the batch go on to their own ends."""
    prompts = [prompt(n) for n in (7, 2, 12)]
    stream = new(tiny_lm, FullCache(30), seeds=[0, 0, 0], steps_per_call=steps)
    stream.feed(prompts)
    drawn, ends = [[], [], []], [[], [], []]
    with pytest.raises(CacheFull, match="would hold 31"):
        for outputs in stream.run(most):
            for i, out in enumerate(outputs):
                drawn[i].extend(out.tokens)
                ends[i] += [out.end] if out.end else []
    for tokens, said in zip(prompts, drawn, strict=True):
        fits = min(most or 30, 30 - len(tokens))
        assert said == answer(tiny_lm, tokens, fits, cache=FullCache(100))
    shortest = "max_tokens" if most else "cache_full"
    assert ends == [["cache_full"], [shortest], ["cache_full"]]
    assert [row.full for row in stream.rows] == [True, not most, True]
    with pytest.raises(CacheFull):
        list(stream.run(3))
    assert [row.tokens for row in stream.rows] == [30, 29 if most else 30, 30]


def test_a_prompt_that_is_refused_changes_nothing(tiny_lm):
    stream = new(tiny_lm, seeds=[0, 0])
    for prompts, message in [
        ([[1], []], "prompt 1 is empty"),
        ([[1], [97]], "token 97 is out of range: tiny has the ids 0 to 96"),
        ([[-1], [1]], "token -1 is out of range"),
        ([[0.5], [1]], "whole numbers"),
        ([[1]], "1 prompts for 2 rows"),
        (["text", [1]], "no tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.feed(prompts)
    stream.feed([prompt(5), prompt(5)])
    first, second = drawn(stream, 10)
    assert first == second == answer(tiny_lm, prompt(5), 10)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(seeds=[]), "seeds must be"),
        (dict(seeds=[-1]), "seeds must be"),
        (dict(seeds=[2**32]), "seeds must be"),
        (dict(steps_per_call=0), "steps_per_call must be ≥ 1"),
        (dict(chunk=0), "chunk must be ≥ 1"),
        (dict(stop=[""]), "empty"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(tiny_lm, wrong, message):
    with pytest.raises(ValueError, match=message):
        Stream(tiny_lm, **(dict(cache=RING, sampling=GREEDY) | wrong))


def test_negative_max_tokens_are_refused(tiny_lm):
    stream = new(tiny_lm)
    stream.feed([[1]])
    with pytest.raises(ValueError, match="max_tokens must be ≥ 0"):
        next(stream.run(-1))


# Scores


@pytest.mark.parametrize("cache", [RING, FullCache(100)], ids=str)
def test_nll_is_that_of_the_definition_in_any_chunks(tiny_lm, cache):
    """Float32 against float64: the scores, of order 3, are good to 1e-6 of that, times the sums
    of two layers; token by token and chunk by chunk differ less."""
    tokens = prompt(90)
    scores = logits(tiny_lm, tokens, cache)[:-1]
    logsumexp = np.log(np.sum(np.exp(scores), axis=-1))
    expected = logsumexp - scores[np.arange(89), tokens[1:]]
    for chunk in (1, 7, 89, 128):
        np.testing.assert_allclose(
            nll(tiny_lm, tokens, cache=cache, chunk=chunk), expected, atol=1e-5
        )


def test_nll_says_how_far_it_is(tiny_lm):
    seen = []
    assert nll(tiny_lm, prompt(20), cache=RING, chunk=8, progress=seen.append).shape == (19,)
    assert seen == [8, 8, 3]


def test_nll_refuses(tiny_lm):
    for tokens, message in [([1], "at least two"), ([[1, 2]], "at least two"), ([1, 97], "range")]:
        with pytest.raises(ValueError, match=message):
            nll(tiny_lm, tokens, cache=RING)
    with pytest.raises(ValueError, match="chunk must be ≥ 1"):
        nll(tiny_lm, [1, 2], cache=RING, chunk=0)
    with pytest.raises(CacheFull):
        nll(tiny_lm, prompt(12), cache=FullCache(10))
    assert nll(tiny_lm, prompt(11), cache=FullCache(10)).shape == (10,)


def test_two_streams_of_a_model_do_not_share_anything(tiny_lm):
    first, second = new(tiny_lm), new(tiny_lm)
    first.feed([prompt(4)])
    second.feed([prompt(6)])
    mixed = [
        (a[0].tokens[0], b[0].tokens[0]) for a, b in zip(first.run(12), second.run(12), strict=True)
    ]
    assert [list(tokens) for tokens in zip(*mixed, strict=True)] == [
        answer(tiny_lm, prompt(4), 12),
        answer(tiny_lm, prompt(6), 12),
    ]


def test_weights_in_bfloat16_give_a_cache_in_bfloat16():
    lm = LanguageModel(tiny_decoder(97, dtype=jnp.bfloat16))
    stream = new(lm)
    stream.feed([prompt(3)])
    (out,) = next(stream.run())
    caches = jax.tree.leaves(dataclasses.replace(stream.state.caches, clocks=()))
    assert len(out.tokens) == 1 and all(x.dtype == jnp.bfloat16 for x in caches)
