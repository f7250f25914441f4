"""StreamEval: recall of recent facts in an endless stream (StreamingLLM, arXiv 2309.17453, §4.3).

A stream of numbered lines, each with a value; after every few lines a question about the value some
lines back. The task was described, never released: the wording here is ours.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from sinkjax.analysis.perplexity import check_modes, policies_of
from sinkjax.caches import LayerCaches, Policy
from sinkjax.mesh import fetch
from sinkjax.models import Decoder
from sinkjax.streaming import LanguageModel
from sinkjax.streaming.step import CHUNK

MODES = ("dense", "window", "streaming")


@dataclasses.dataclass(frozen=True)
class Task:
    """A stream of tokens, and where in it the answers are.

    Attributes:
        token_ids: `[N]`: lines, questions and right answers as they follow one another.
        spans: `[Q, 2]`, first token of each answer and the one after its last.
        lines: `[Q]`, how many lines came before each question.
    """

    token_ids: Int[np.ndarray, " N"]
    spans: Int[np.ndarray, "Q 2"]
    lines: Int[np.ndarray, " Q"]

    @classmethod
    def make(
        cls,
        encode: Callable[[str], Sequence[int]],
        *,
        lines: int,
        every: int = 10,
        back: int = 20,
        seed: int = 0,
        start: Sequence[int] = (),
    ) -> Self:
        """Writes the stream.

        Args:
            encode: from text to token ids. Values are encoded apart from what is around them, so
                that a value has the same tokens wherever it stands.
            lines: how many.
            every: a question after every so many lines.
            back: it asks for the value so many lines back (0: the newest line's).
            seed: of the names and values.
            start: ids that begin the stream, such as a beginning-of-text token.

        Raises:
            ValueError: a number out of range, or no room for a single question.
        """
        for name, given, least in (("every", every, 1), ("back", back, 0), ("seed", seed, 0)):
            if given < least:
                raise ValueError(f"{name} must be ≥ {least}, got {given}")
        ids = list(start)
        spans, asked_at = [], []
        for number, head, value, asked in script(lines, every=every, back=back, seed=seed):
            ids += encode(head)
            answer = encode(value)
            if asked:
                spans.append((len(ids), len(ids) + len(answer)))
                asked_at.append(number)
            ids += [*answer, *encode(">\n")]
        if not spans:
            raise ValueError(f"{lines} lines, every {every}, {back} back: no question comes up")
        return cls(np.asarray(ids, np.int32), np.asarray(spans), np.asarray(asked_at))


def script(lines: int, *, every: int, back: int, seed: int) -> list[tuple[int, str, str, bool]]:
    """The stream as text: (lines so far, text before the value, value, whether it is asked for).

    Two pieces of it: "line 12: register Kamotu <4521>", "Question about line 12: register Kamotu
    <4521>". The same words come before the value in both, which is all that a small model needs.
    """
    rng = np.random.default_rng(seed)
    known: list[tuple[str, str]] = []
    out = []
    for number in range(1, lines + 1):
        name, value = made_up_name(rng), str(rng.integers(1000, 10_000))
        known.append((f"line {number}: register {name} <", value))
        out.append((number, *known[-1], False))
        if number % every == 0 and number > back:
            fact, answer = known[-1 - back]
            out.append((number, f"Question about {fact}", answer, True))
    return out


def made_up_name(rng: np.random.Generator) -> str:
    """Three syllables, which no text is likely to have."""
    # Lines that differ in the digits of a number alone, SmolLM2-135M takes for one another.
    consonants, vowels = (rng.choice(list(s), 3) for s in ("bdfgklmnprstvz", "aeiou"))
    return "".join(c + v for c, v in zip(consonants, vowels, strict=True)).capitalize()


@dataclasses.dataclass(frozen=True)
class Recall:
    """How a model did, question by question.

    Attributes:
        tokens: `[Q]`, tokens read when the answer was due.
        lines: `[Q]`, lines read by then.
        correct: `[Q]`, whether greedy decoding gives the whole answer.
        nll: `[Q]`, nats a token of the right answer: the same, less noisy.
    """

    tokens: Int[np.ndarray, " Q"]
    lines: Int[np.ndarray, " Q"]
    correct: Bool[np.ndarray, " Q"]
    nll: Float[np.ndarray, " Q"]

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.correct))

    def buckets(self, size: int) -> list["Recall"]:
        """The questions by multiples of `size` tokens; parts without a question left out.

        Raises:
            ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"a bucket needs a size ≥ 1 token, got {size}")
        of = self.tokens // size
        fields = (self.tokens, self.lines, self.correct, self.nll)
        return [Recall(*(x[of == i] for x in fields)) for i in np.unique(of)]


def grade(task: Task, likeliest: Int[np.ndarray, " N-1"], nll: Float[np.ndarray, " N-1"]) -> Recall:
    """Marks the answers.

    Greedy decoding gives the right answer exactly where each of its tokens is the likeliest after
    the ones before it. So nothing has to be drawn, and the stream stays as it is.

    Args:
        task: the stream.
        likeliest: for each token but the first, which one the model expected there.
        nll: of each token but the first.
    """
    hit = likeliest == task.token_ids[1:]
    parts = [slice(start - 1, stop - 1) for start, stop in task.spans]
    return Recall(
        tokens=task.spans[:, 0],
        lines=task.lines,
        correct=np.array([hit[part].all() for part in parts]),
        nll=np.array([nll[part].mean() for part in parts]),
    )


def stream_recall(
    lm: LanguageModel,
    task: Task,
    *,
    sinks: int = 4,
    window: int = 1020,
    modes: Sequence[str] = MODES,
    caches: Mapping[str, Policy] | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
) -> dict[str, Recall]:
    """Lets a model read the stream under several caches, and marks its answers.

    The right answers are in the stream, whatever the model would have said: later questions see
    well-formed examples.

    Args:
        lm: the model.
        task: see `Task.make`.
        sinks, window, modes, caches, chunk, progress: see `perplexity_curves` (no `recompute`).

    Raises:
        ValueError: an unknown mode, a size or a token id out of range.
        CacheFull: the stream is longer than a full cache of `caches`.
    """
    caches = caches or {}
    check_modes(modes, MODES, caches)
    reader = Reader(lm, chunk=chunk)
    ids = lm.check_tokens(task.token_ids)
    N = len(ids) - 1
    policies = policies_of(modes, caches, sinks=sinks, window=window, tokens=N)
    for policy in policies.values():
        policy.check(N)
    out = {}
    for mode, policy in policies.items():
        with tqdm(total=N, desc=mode, unit="token", disable=not progress) as bar:
            out[mode] = grade(task, *reader.read(ids, policy, bar.update))
    return out


class Reader:
    """Lets a model read texts, under any cache, and says what it expected. Compiles once a policy.

    Args:
        lm: the model.
        chunk: tokens per call; changes speed and memory alone.

    Raises:
        ValueError: chunk < 1.
    """

    def __init__(self, lm: LanguageModel, *, chunk: int = CHUNK):
        if chunk < 1:
            raise ValueError(f"chunk must be ≥ 1, got {chunk}")
        self._lm, self._chunk = lm, chunk
        self._step = lm.compiled(_scored, lambda caches, rows: (caches, P(rows), P(rows)))

    def read(
        self,
        ids: Int[np.ndarray, " N"],
        policy: Policy,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[Int[np.ndarray, " N-1"], Float[np.ndarray, " N-1"]]:
        """The token that was expected in place of each but the first, and the surprise at each,
        in nats.

        Args:
            ids: at least two, all of the vocabulary.
            policy: what the model remembers; has room for N − 1 tokens.
            progress: called with the number of tokens read, after each chunk.
        """
        caches = self._lm.init_caches(policy)
        likeliest, nll = [], []
        for start in range(0, len(ids) - 1, self._chunk):
            length = min(self._chunk, len(ids) - 1 - start)
            pair = np.zeros((2, 1, self._chunk), np.int32)
            pair[:, 0, :length] = ids[start : start + length], ids[start + 1 : start + 1 + length]
            caches, best, surprise = self._step(caches, *pair, np.asarray([length], np.int32))
            likeliest.append(fetch(best)[0, :length])
            nll.append(fetch(surprise)[0, :length])
            if progress:
                progress(length)
        return np.concatenate(likeliest), np.concatenate(nll)


def _scored(
    model: Decoder, caches: LayerCaches, tokens: Array, targets: Array, lengths: Array
) -> tuple[LayerCaches, Array, Array]:
    hidden, caches = model(tokens, caches, lengths)
    log_p = jax.nn.log_softmax(model.logits(hidden))
    surprise = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return caches, jnp.argmax(log_p, axis=-1), surprise
