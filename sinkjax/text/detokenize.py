"""Text from a stream of tokens, as it comes, and the strings that end it.

Both classes take constant time and memory per token however long the stream, and both give their
state as a short list of integers, so that a live stream can be saved and resumed mid-character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Self

from sinkjax.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids into text one by one, without ever printing half a character.

    All that `push` returned, then `flush()`, is `tokenizer.decode` of all the ids. A SentencePiece
    vocabulary drops the space before its first word: for text that goes on after a prompt, push
    the prompt's ids first and drop what comes back.

    Args:
        tokenizer: the tokenizer of the model that the ids come from.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """Returns the text that is certain now that `token_id` is known: "" while a character is
        incomplete, for special tokens, and for ids beyond the vocabulary: the tables of many models
        are wider than that of their tokenizer.

        Raises:
            ValueError: the id is below 0, or one that the vocabulary leaves out.
        """
        if token_id >= self._tokenizer.vocab_size:
            return ""
        return self._text(self._tokenizer.token_bytes(token_id, skip_special=True))

    def flush(self) -> str:
        """Ends the text and returns what was held back: U+FFFD, or "" where nothing was."""
        text = self._text(b"", final=True)
        self._at_start = self._tokenizer.strips_leading_space
        return text

    def state(self) -> list[int]:
        """Returns what `from_state` needs: whether the text has yet to begin, then the bytes of
        an incomplete character (3 at most)."""
        return [int(self._at_start), *self._utf8.getstate()[0]]

    @classmethod
    def from_state(cls, tokenizer: Tokenizer, state: Sequence[int]) -> Self:
        """Returns a detokenizer that goes on where the one with this `state()` was.

        Raises:
            ValueError: `state` is not one that `state()` gave.
        """
        at_start, *held = map(int, state) if len(state) else (-1,)
        detokenizer = cls(tokenizer)
        if at_start in (0, int(tokenizer.strips_leading_space)) and all(
            0 <= byte < 256 for byte in held
        ):
            begun = detokenizer._utf8.decode(bytes(held))
            detokenizer._at_start = bool(at_start)
            if begun == "" and detokenizer.state() == [at_start, *held]:
                return detokenizer
        raise ValueError(
            f"{list(state)} is no detokenizer state; expected 0 or 1, then at most 3 bytes that "
            "begin a UTF-8 character"
        )

    def _text(self, piece: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(piece, final)
        if text and self._at_start:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Ends a stream of text where one of some strings is complete.

    The string that is complete first wins, and of those that end at the same character the
    longest, however the text was cut into pieces.

    Args:
        strings: the stop strings; with none, no text ever stops.

    Raises:
        ValueError: one of them is empty.
        TypeError: `strings` is a single string.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        if isinstance(strings, str):
            raise TypeError(f"strings is the string {strings!r}; expected a list, [{strings!r}]")
        self._strings = tuple(strings)
        if "" in self._strings:
            raise ValueError(f"stop strings {self._strings!r}: an empty one would stop at once")
        self._longest = max(map(len, self._strings), default=1)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece of text.

        Returns:
            The text that is certain not to belong to a stop string, and whether one is complete.
            After that the text has ended: later pieces give `("", True)`.
        """
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [(text.find(s) + len(s), text.find(s)) for s in self._strings if s in text]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        ends = range(max(0, len(text) - self._longest + 1), len(text))
        keep = next((n for n in ends if self._may_begin(text[n:])), len(text))
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """Ends the text and returns what was held back, as no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def state(self) -> list[int]:
        """Returns what `from_state` needs: whether the text has stopped, then the characters
        held back (fewer than the longest stop string has), as code points."""
        return [int(self._stopped), *map(ord, self._held)]

    @classmethod
    def from_state(cls, strings: Iterable[str], state: Sequence[int]) -> Self:
        """Returns one that goes on where the one with the same strings and this `state()` was.

        Raises:
            ValueError: `state` is not one that `state()` gave with these strings.
        """
        stop = cls(strings)
        stopped, *held = map(int, state) if len(state) else (-1,)
        text = "".join(map(chr, held))
        if stopped not in (0, 1) or (text and (stopped or not stop._may_begin(text))):
            raise ValueError(
                f"{list(state)} is no state of the stop strings {stop._strings!r}; expected 0 or "
                "1, then the code points of the beginning of one of them"
            )
        stop._stopped, stop._held = bool(stopped), text
        return stop

    def _may_begin(self, text: str) -> bool:
        return any(s.startswith(text) for s in self._strings)
