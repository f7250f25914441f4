"""A live stream: the state on the device, the text on the host, and the loop between them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sinkjax.caches import Policy
from sinkjax.mesh import fetch
from sinkjax.streaming.sampling import Sampling
from sinkjax.streaming.step import CHUNK
from sinkjax.text.detokenize import Detokenizer, StopStrings

if TYPE_CHECKING:
    from sinkjax.streaming.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Output:
    """What one row gave in one call.

    Attributes:
        text: printable, complete characters; may be empty.
        tokens: the ids drawn, a stop token included.
        end: why the row ended: `"stop_token"`, `"stop_string"`, `"max_tokens"`, `"cache_full"`;
            None: it goes on, or had ended before.
    """

    text: str
    tokens: tuple[int, ...]
    end: str | None


@dataclasses.dataclass
class Row:
    """The host's part of one row."""

    detokenizer: Detokenizer | None
    stops: StopStrings
    fed: int = 0  # tokens of prompts
    drawn: int = 0
    ended: bool = False
    full: bool = False  # ended because its cache is full

    @property
    def tokens(self) -> int:
        return self.fed + self.drawn


class Stream:
    """One or several streams that run side by side, a row each.

    Args:
        lm: the model.
        cache: what each row remembers.
        sampling: how tokens are drawn.
        seeds: one a row, 0 ≤ seed < 2³².
        stop: strings before which the text of a row ends. They are seen on the host, after each
            call: what the same call drew behind one is not printed, but is in the cache.
        ignore_eos: go on when the model ends its text.
        steps_per_call: tokens drawn by one call of the compiled step. More hide the host's work;
            text then comes in larger pieces.
        chunk: tokens that one prefill call takes.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        lm: "LanguageModel",
        *,
        cache: Policy,
        sampling: Sampling,
        seeds: Sequence[int] = (0,),
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        steps_per_call: int = 1,
        chunk: int = CHUNK,
    ):
        for name, value in dict(steps_per_call=steps_per_call, chunk=chunk).items():
            if value < 1:
                raise ValueError(f"{name} must be ≥ 1, got {value}")
        if not seeds or any(not 0 <= s < 2**32 for s in seeds):
            raise ValueError(f"seeds must be whole numbers in [0, 2³²), one a row, got {seeds}")
        self.lm, self.cache, self.sampling = lm, cache, sampling
        self.seeds, self.stop = tuple(seeds), tuple(stop)
        self.ignore_eos = ignore_eos
        self.steps_per_call, self.chunk = steps_per_call, chunk
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the stream is as new."""
        tokenizer = self.lm.tokenizer if self.lm.has_tokenizer else None
        self.state = self.lm.init_state(self.cache, self.sampling, seeds=self.seeds)
        self.rows = [
            Row(Detokenizer(tokenizer) if tokenizer else None, StopStrings(self.stop))
            for _ in self.seeds
        ]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return () if self.ignore_eos else self.lm.eos_ids

    def feed(self, prompts: Sequence[str | Sequence[int]]) -> None:
        """Lets each row read its prompt (or its next turn), in chunks of one fixed shape.

        Args:
            prompts: one a row: text, or token ids.

        Raises:
            ValueError: an empty prompt, a token out of range, not one prompt a row.
            CacheFull: a prompt does not fit a `FullCache`.
        """
        if len(prompts) != len(self.rows):
            raise ValueError(f"{len(prompts)} prompts for {len(self.rows)} rows")
        ids = [
            self.lm.check_tokens(self.lm.tokenizer.encode(p) if isinstance(p, str) else p)
            for p in prompts
        ]
        for number, (row, tokens) in enumerate(zip(self.rows, ids, strict=True)):
            if not len(tokens):
                raise ValueError(f"prompt {number} is empty: give it at least one token")
            self.cache.check(row.tokens + len(tokens))
        for start in range(0, max(map(len, ids)), self.chunk):
            part = np.zeros((len(ids), self.chunk), np.int32)
            lengths = np.zeros(len(ids), np.int32)
            for number, tokens in enumerate(ids):
                piece = tokens[start : start + self.chunk]
                part[number, : len(piece)], lengths[number] = piece, len(piece)
            self.state = self.lm.prefill(self.state, part, lengths)
        for row, tokens in zip(self.rows, ids, strict=True):
            row.fed += len(tokens)
            row.ended = row.full = False
            if row.detokenizer:
                # The reply goes on where the prompt's text ends, perhaps inside a character.
                for token in tokens[-8:]:
                    row.detokenizer.push(int(token))

    def run(self, max_tokens: int = 0) -> Iterator[list[Output]]:
        """Draws tokens until every row has ended, one list of `Output` (one a row) per call.

        Args:
            max_tokens: at most so many more a row; 0: for ever.

        Raises:
            ValueError: max_tokens < 0.
            CacheFull: a row's `FullCache` has no place left. All that fitted was given before, and
                other rows have come to their own ends.
        """
        if max_tokens < 0:
            raise ValueError(f"max_tokens must be ≥ 0 (0: for ever), got {max_tokens}")
        left, last = max_tokens, False
        while not last and (live := [row for row in self.rows if not row.ended]):
            limit = min(self.steps_per_call, left) if max_tokens else self.steps_per_call
            if self.cache.limit is not None:
                limit = min(limit, self.cache.limit - max(row.tokens for row in live))
            if limit == 0:
                yield self._ended_by_cache()
                continue
            self.state, drawn = self.lm.decode(
                self.state,
                np.int32(limit),
                steps=self.steps_per_call,
                sampling=self.sampling,
                stop_tokens=self.stop_tokens,
            )
            left -= limit
            last = max_tokens > 0 and left == 0
            yield self._outputs(fetch(drawn), last=last)
        for row in self.rows:
            if row.full:
                self.cache.check(row.tokens + 1)

    def pieces(self, max_tokens: int = 0) -> Iterator[list[str]]:
        """The texts of `run`."""
        return ([out.text for out in outputs] for outputs in self.run(max_tokens))

    def _ended_by_cache(self) -> list[Output]:
        outputs = []
        for row in self.rows:
            if row.ended or row.tokens != self.cache.limit:
                outputs.append(Output("", (), None))
                continue
            row.ended = row.full = True
            outputs.append(Output(self._held_back(row), (), "cache_full"))
        self._tell_who_ended()
        return outputs

    def _tell_who_ended(self) -> None:
        ended = self.lm.put_rows(np.asarray([row.ended for row in self.rows]))
        self.state = dataclasses.replace(self.state, done=ended)

    def _held_back(self, row: Row) -> str:
        """The text that waited for the rest of a character or of a stop string."""
        if row.detokenizer is None:
            return ""
        text = row.stops.push(row.detokenizer.flush())[0] + row.stops.flush()
        row.stops = StopStrings(self.stop)
        return text

    def _outputs(self, drawn: np.ndarray, *, last: bool) -> list[Output]:
        outputs = []
        was_ended = [row.ended for row in self.rows]
        for row, column in zip(self.rows, drawn.T, strict=True):
            if row.ended:
                outputs.append(Output("", (), None))
                continue
            tokens = tuple(int(t) for t in column if t >= 0)
            row.drawn += len(tokens)
            text, end = "", None
            for token in tokens:
                piece, stopped = row.stops.push(
                    row.detokenizer.push(token) if row.detokenizer else ""
                )
                text += piece
                if stopped:
                    end = "stop_string"
                    break
            if end is None and tokens and tokens[-1] in self.stop_tokens:
                end = "stop_token"
            elif end is None and last:
                end = "max_tokens"
            if end and end != "stop_string":
                text += self._held_back(row)
            if end:
                row.ended = end != "max_tokens"  # `run` may be called again
                row.stops = StopStrings(self.stop)
            outputs.append(Output(text, tokens, end))
        if [row.ended for row in self.rows] != was_ended:
            self._tell_who_ended()
        return outputs

    def stats(self) -> dict[str, int]:
        """Tokens fed, drawn, and forgotten, and slots filled, over all rows."""
        tokens = [row.tokens for row in self.rows]
        filled = [min(n, self.cache.capacity) for n in tokens]
        return dict(
            tokens_fed=sum(row.fed for row in self.rows),
            tokens_drawn=sum(row.drawn for row in self.rows),
            slots_filled=sum(filled),
            slots=self.cache.capacity * len(self.rows),
            tokens_forgotten=sum(tokens) - sum(filled),
        )
