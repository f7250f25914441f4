"""Synthetic passkeys in real text: the data on which retrieval heads show (arXiv 2410.10819, §2.2).

The construction is DuoAttention's, the wording ours.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from sinkjax.analysis.haystack import NATO, hide


@dataclasses.dataclass(frozen=True)
class Passkeys:
    """What a row holds.

    Attributes:
        count: passkeys in a row, each asked for at its end.
        words: random words of the NATO alphabet in each.
        text: the haystack: a file, a folder, or the name of a built-in text.
        tokens: of its beginning that are read; each row has a piece from anywhere in them.

    Raises:
        ValueError: a number below 1.
    """

    count: int = 10
    words: int = 32
    text: str = "sotu"
    tokens: int = 200_000

    def __post_init__(self):
        for name in ("count", "words", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"passkeys need {name} ≥ 1, got {getattr(self, name)}")


class PasskeyRows:
    """Rows of tokens: a haystack with passkeys at random depths, then a question for each, and its
    answer. A row follows from its seed alone.

    Args:
        task: what the rows hold.
        haystack: `[N]`, token ids.
        encode: from text to token ids. Questions and passkeys are encoded apart, so that a passkey
            has the same tokens in both of its places.
        start: ids that begin a row, such as a beginning-of-text token.
    """

    def __init__(
        self,
        task: Passkeys,
        haystack: Int32[np.ndarray, " N"],
        encode: Callable[[str], Sequence[int]],
        start: Sequence[int] = (),
    ):
        self._task, self._haystack, self._start = task, np.asarray(haystack, np.int32), list(start)
        self._encode = encode

    def row(
        self, length: int, seed: Sequence[int]
    ) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """A row, and where in it the answers are: their tokens, and the one before each, from
        which its first is told.

        Args:
            length: T, exact.
            seed: whole numbers ≥ 0.

        Raises:
            ValueError: passkeys and questions alone are longer, or the haystack is shorter.
        """
        rng = np.random.default_rng(list(seed))
        keys, asked, is_answer = [], [], []
        for number in range(1, self._task.count + 1):
            words = rng.choice(NATO, self._task.words)
            value = list(self._encode("".join(f" {word}" for word in words)))
            told = f"\n\nRemember pass key number {number}:"
            keys.append([*self._encode(told), *value, *self._encode(".\n\n")])
            question = self._encode(f"\n\nQuestion: What is pass key number {number}?\nAnswer:")
            asked += [*question, *value]
            is_answer += [False] * (len(question) - 1) + [True] * (len(value) + 1)
        anywhere = [None] * len(keys)
        ids, _ = hide(
            keys, anywhere, self._haystack, length=length, rng=rng, start=self._start, end=asked
        )
        answers = np.zeros(length, bool)
        answers[length - len(asked) :] = is_answer
        return ids, answers

    def batch(
        self, rows: int, length: int, seed: Sequence[int]
    ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """So many rows, each of a seed of its own. See `row`."""
        made = [self.row(length, [*seed, row]) for row in range(rows)]
        tokens, answers = zip(*made, strict=True)
        return np.stack(tokens), np.stack(answers)
