"""Is what lies far back still there? Passkeys and needles at every depth of texts of every length.

Passkeys as in DuoAttention (arXiv 2410.10819, §3.2): random words, which nothing but memory can
tell. Needles: a sentence in a long text, and a question about it. The wording is ours.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
from jaxtyping import Float, Int

from sinkjax.analysis.haystack import NATO, hide
from sinkjax.analysis.streameval import Reader, made_up_name
from sinkjax.caches import Policy
from sinkjax.streaming import LanguageModel, Sampling, Stream
from sinkjax.streaming.step import CHUNK

_SPICES = (
    "anise basil caraway cinnamon cloves coriander cumin dill fennel garlic ginger juniper lovage "
    "marjoram mint mustard nutmeg oregano paprika pepper rosemary saffron sage thyme turmeric"
).split()
SPARE = 8  # tokens more than the answer has that a model may write
_DRAWS = 100  # of answers, until one is not in the text by chance

Encode = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text with something hidden in it, up to where the model has to say it.

    Attributes:
        token_ids: `[length]`, int32, all that is read before the answer.
        answer: the right one, as token ids, word by word.
        text: the same as text.
        hidden_at: the token of `token_ids` at which the sentence with the answer begins.
        length, depth, sample: which cell of a grid it is for, and which one of that cell.
    """

    token_ids: Int[np.ndarray, " length"]
    answer: tuple[tuple[int, ...], ...]
    text: str
    hidden_at: int
    length: int
    depth: float
    sample: int

    @property
    def answer_ids(self) -> Int[np.ndarray, " A"]:
        return np.asarray([i for word in self.answer for i in word], np.int32)


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """A sentence to hide and the question about it: the same words stand before both answers."""

    before: str
    question: str
    words: tuple[str, ...]

    @property
    def answer(self) -> str:
        return "".join(self.words)


def passkey_prompts(
    encode: Encode,
    haystack: Sequence[int] | Int[np.ndarray, " N"],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int = 1,
    words: int = 32,
    keys: int = 1,
    seed: int = 0,
    start: Sequence[int] = (),
) -> list[Prompt]:
    """Texts in which passkeys of random words are hidden.

    Each key has the name of a made-up owner, and the question asks for the one at the depth of the
    cell. With several `keys`, the others lie at random depths.

    Args:
        encode: from text to token ids, without a beginning-of-text token. Sentences, and each word
            of an answer, are encoded apart, so that they have the same tokens wherever they stand.
        haystack: token ids of a long text. Each prompt has a stretch of it from a random place.
        lengths: of prompts, in tokens, the question included.
        depths: in [0, 1]: how much of the stretch comes before the key; 1: the question is next.
        samples: prompts for each pair of a length and a depth.
        words: of a key.
        keys: in a prompt.
        seed: of all that is random. A prompt depends on it, on its length, its depth and its
            sample, not on which others are asked for.
        start: ids that begin a prompt, such as a beginning-of-text token.

    Returns:
        `lengths × depths × samples` prompts, in that order.

    Raises:
        ValueError: a number out of range, a length with no room for keys and question or longer
            than the haystack, or too few words for an answer that is not in the text by chance.
    """
    for name, given in (("words", words), ("keys", keys)):
        if given < 1:
            raise ValueError(f"{name} must be ≥ 1, got {given}")

    def draw(rng: np.random.Generator) -> list[_Hidden]:
        owners: set[str] = set()
        while len(owners) < keys:
            owners.add(made_up_name(rng))
        drawn = []
        for owner in sorted(owners):
            key = tuple(f" {word}" for word in rng.choice(NATO, words))
            same = f"passkey of {owner} is"
            drawn.append(_Hidden(f"\n\nRemember: the {same}", f"\n\nNow say: the {same}", key))
        return drawn

    return _prompts(encode, haystack, draw, lengths, depths, samples, seed, start)


def needle_prompts(
    encode: Encode,
    haystack: Sequence[int] | Int[np.ndarray, " N"],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int = 1,
    seed: int = 0,
    start: Sequence[int] = (),
) -> list[Prompt]:
    """Texts in which a sentence with a fact is hidden. See `passkey_prompts`."""

    def draw(rng: np.random.Generator) -> list[_Hidden]:
        same = f"secret of the soup of {made_up_name(rng)} is"
        first, second = rng.choice(_SPICES, 2, replace=False)
        question = f"\n\nQuestion: What is the {same.removesuffix(' is')}?\nAnswer: The {same}"
        return [_Hidden(f"\n\nThe {same}", question, (f" {first}", " and", f" {second}"))]

    return _prompts(encode, haystack, draw, lengths, depths, samples, seed, start)


def _prompts(
    encode: Encode,
    haystack: Sequence[int] | Int[np.ndarray, " N"],
    draw: Callable[[np.random.Generator], list[_Hidden]],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    start: Sequence[int],
) -> list[Prompt]:
    for name, given, least in (("samples", samples, 1), ("seed", seed, 0)):
        if given < least:
            raise ValueError(f"{name} must be ≥ {least}, got {given}")
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not len(values) or len(set(values)) != len(values):
            raise ValueError(f"{name} must be some, each once, got {list(values)}")
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"a depth is a share of the text, in [0, 1], got {wrong[0]}")
    text = np.asarray(haystack, np.int32)
    out = []
    for length, depth, sample in itertools.product(lengths, depths, range(samples)):
        rng = np.random.default_rng([seed, length, round(depth * 1e6), sample])
        for _ in range(_DRAWS):
            prompt = _prompt(encode, text, draw(rng), rng, length, depth, sample, start)
            if prompt is not None:
                out.append(prompt)
                break
        else:
            raise ValueError(
                f"the text has the answers by itself ({_DRAWS} were drawn): ask for more words"
            )
    return out


def _prompt(
    encode: Encode,
    text: Int[np.ndarray, " N"],
    drawn: list[_Hidden],
    rng: np.random.Generator,
    length: int,
    depth: float,
    sample: int,
    start: Sequence[int],
) -> Prompt | None:
    """A prompt that hides the first of `drawn` at a depth, the others anywhere; None where its
    answer would be in it more than once."""
    asked = drawn[0]
    answer = tuple(tuple(encode(word)) for word in asked.words)
    hidden = []
    for one in drawn:
        words = [i for word in one.words for i in encode(word)]
        hidden.append([*encode(one.before), *words, *encode(".\n\n")])
    depths = [depth] + [None] * (len(drawn) - 1)
    question = encode(asked.question)
    ids, starts = hide(hidden, depths, text, length=length, rng=rng, start=start, end=question)
    prompt = Prompt(ids, answer, asked.answer, starts[0], length, depth, sample)
    whole = np.concatenate([prompt.token_ids, prompt.answer_ids])
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(prompt.answer_ids))
    return prompt if (windows == prompt.answer_ids).all(-1).sum() == 2 else None


def recall_by_reading(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    policy: Policy,
    *,
    chunk: int = CHUNK,
    progress: Callable[[int], object] | None = None,
) -> Float[np.ndarray, " P"]:
    """How much of each answer a model knows: one pass over the prompt with its answer.

    A word counts where each of its tokens is the likeliest after the right ones before it: the
    tokens that end a word tell nothing by themselves.

    Args:
        lm: the model.
        prompts: see `passkey_prompts`.
        policy: what the model remembers.
        chunk: tokens per call; changes speed and memory alone.
        progress: called with the number of tokens read, after each chunk.

    Returns:
        `[P]`, in [0, 1]: the share of the words.

    Raises:
        ValueError: a token id out of range, or chunk < 1.
        CacheFull: a prompt with its answer does not fit.
    """
    reader = Reader(lm, chunk=chunk)
    whole = [lm.check_tokens([*p.token_ids, *p.answer_ids]) for p in prompts]
    for ids in whole:
        policy.check(len(ids) - 1)
    marks = []
    for prompt, ids in zip(prompts, whole, strict=True):
        likeliest, _ = reader.read(ids, policy, progress)
        marks.append(words_known(prompt, likeliest[len(prompt.token_ids) - 1 :]))
    return np.asarray(marks)


def words_known(prompt: Prompt, likeliest: Int[np.ndarray, " A"]) -> float:
    """The share of the words of an answer all tokens of which were expected.

    Args:
        prompt: whose answer it is.
        likeliest: the token that was expected in place of each of `prompt.answer_ids`.
    """
    hit = likeliest == prompt.answer_ids
    ends = np.cumsum([len(word) for word in prompt.answer])
    return float(np.mean([part.all() for part in np.split(hit, ends[:-1])]))


def recall_by_writing(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    policy: Policy,
    *,
    spare: int = SPARE,
    chunk: int = CHUNK,
    progress: Callable[[int], object] | None = None,
) -> Float[np.ndarray, " P"]:
    """Whether a model writes each answer, by greedy decoding.

    Args:
        lm: the model, with its tokenizer.
        prompts: see `needle_prompts`.
        policy: what the model remembers.
        spare: how many tokens more than the answer has the model may write.
        chunk: tokens that one prefill call takes.
        progress: called with the number of tokens of each prompt, once it is done.

    Returns:
        `[P]`: 1 where what it writes contains the answer (in upper or lower case), else 0.

    Raises:
        ValueError: a token id out of range, spare < 0, or chunk < 1.
        CacheFull: a prompt with what the model may write does not fit.
    """
    if spare < 0:
        raise ValueError(f"spare must be ≥ 0, got {spare}")
    room = [len(p.answer_ids) + spare for p in prompts]
    for prompt, more in zip(prompts, room, strict=True):
        policy.check(len(prompt.token_ids) + more)
    stream = Stream(lm, cache=policy, sampling=Sampling(), chunk=chunk)
    marks = []
    for prompt, more in zip(prompts, room, strict=True):
        stream.reset()
        stream.feed([prompt.token_ids.tolist()])
        said = "".join(piece for (piece,) in stream.pieces(more))
        marks.append(contains(said, prompt.text))
        if progress:
            progress(len(prompt.token_ids))
    return np.asarray(marks, np.float64)


def contains(said: str, answer: str) -> bool:
    return answer.strip().casefold() in said.casefold()


@dataclasses.dataclass(frozen=True)
class Grid:
    """Recall by depth and length.

    Attributes:
        lengths, depths: of the grid, in the order of the prompts.
        recall: `[depths, lengths]`, the mean of each cell's samples.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    recall: Float[np.ndarray, "depths lengths"]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], marks: Float[np.ndarray, " P"]) -> Self:
        """The grid of prompts that were marked."""
        cells: dict[tuple[float, int], list[float]] = {}
        for prompt, mark in zip(prompts, marks, strict=True):
            cells.setdefault((prompt.depth, prompt.length), []).append(float(mark))
        lengths = tuple(dict.fromkeys(p.length for p in prompts))
        depths = tuple(dict.fromkeys(p.depth for p in prompts))
        table = [[np.mean(cells[depth, length]) for length in lengths] for depth in depths]
        return cls(lengths, depths, np.asarray(table))

    @property
    def mean(self) -> float:
        return float(self.recall.mean())
