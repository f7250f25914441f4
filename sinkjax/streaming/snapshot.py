"""Live streams on disk: the whole state of a stream, saved atomically, and resumed exactly.

A folder holds the text of each row so far (`text-0.txt`, …), appended to as it comes, and the
newest snapshots (`at-<tokens>`). A snapshot is written under a temporary name and renamed when
complete; it says how many bytes of text belong to it, and what lies behind them is cut off on
resume. So a stream can be killed at any moment, and goes on from its last snapshot.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from sinkjax.caches import FullCache, Policy, SinkRing
from sinkjax.checkpoints.orbax import restore_tree, save_tree
from sinkjax.streaming.language_model import LanguageModel
from sinkjax.streaming.sampling import Sampling
from sinkjax.streaming.step import StreamState
from sinkjax.streaming.stream import Output, Row, Stream
from sinkjax.text.detokenize import Detokenizer, StopStrings

_FORMAT = 2
_KEPT = 2  # snapshots: the newest, and the one before it in case that a disk loses the newest
_POLICIES: dict[str, type] = {"SinkRing": SinkRing, "FullCache": FullCache}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a stream was started with, and must be resumed with.

    Attributes:
        cache, sampling, seeds, stop, ignore_eos: see `Stream`.
        extra: what the caller wants to find again (the command keeps its model's name here).
    """

    cache: Policy
    sampling: Sampling
    seeds: tuple[int, ...]
    stop: tuple[str, ...]
    ignore_eos: bool
    extra: dict

    def to_json(self) -> dict:
        return dict(
            cache={"policy": type(self.cache).__name__, **dataclasses.asdict(self.cache)},  # type: ignore[call-overload]
            sampling=dataclasses.asdict(self.sampling),
            seeds=list(self.seeds),
            stop=list(self.stop),
            ignore_eos=self.ignore_eos,
            extra=self.extra,
        )

    def new_stream(self, lm: LanguageModel, *, steps_per_call: int = 1) -> Stream:
        return Stream(
            lm,
            cache=self.cache,
            sampling=self.sampling,
            seeds=self.seeds,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            steps_per_call=steps_per_call,
        )

    @classmethod
    def from_json(cls, values: dict) -> Self:
        cache = dict(values["cache"])
        policy = _POLICIES[cache.pop("policy")](**cache)
        return cls(
            policy,
            Sampling(**values["sampling"]),
            tuple(values["seeds"]),
            tuple(values["stop"]),
            values["ignore_eos"],
            values["extra"],
        )


class Recorder:
    """Keeps a stream on disk.

    Args:
        folder: where. Made if absent. An absent or empty folder starts anew; to go on in one that
            holds a stream, resume it first (`resume`), and give its stream here.
        stream: the stream.
        every: tokens between snapshots.
        extra: a few plain values to keep with the settings.

    Raises:
        ValueError: `every` < 1, or the folder holds another stream.
        OSError: the folder can't be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        stream: Stream,
        *,
        every: int,
        extra: dict | None = None,
        resumed: bool = False,
    ):
        if every < 1:
            raise ValueError(f"every must be ≥ 1 token, got {every}")
        self.folder, self.stream, self.every = pathlib.Path(folder), stream, every
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resumed and _snapshots(self.folder):
            raise ValueError(
                f"{self.folder} holds a saved stream already: resume it, or save to another folder"
            )
        for partial in self.folder.glob(".partial-*"):  # of a save that was killed
            shutil.rmtree(partial, ignore_errors=True)
        self._settings = Settings(
            stream.cache,
            stream.sampling,
            stream.seeds,
            stream.stop,
            stream.ignore_eos,
            extra or {},
        )
        self._fingerprint = stream.lm.fingerprint()
        self._unsaved = 0
        self._texts: list[io.BufferedWriter] = [
            open(path, "ab" if resumed else "wb") for path in _texts(self.folder, len(stream.rows))
        ]

    def record(self, outputs: list[Output]) -> None:
        """Appends what one call gave; saves when it is time."""
        for file, out in zip(self._texts, outputs, strict=True):
            file.write(out.text.encode())
        self._unsaved += max(len(out.tokens) for out in outputs)
        if self._unsaved >= self.every:
            self.save()

    def save(self) -> None:
        """Writes a snapshot. A failure raises, and leaves the one before as it was."""
        stream = self.stream
        for text in self._texts:
            text.flush()
            os.fsync(text.fileno())
        host = dict(
            format=_FORMAT,
            model=self._fingerprint,
            settings=self._settings.to_json(),
            text_bytes=[text.tell() for text in self._texts],
            rows=[_row_to_json(row) for row in stream.rows],
        )
        tokens = sum(row.tokens for row in stream.rows)
        final = self.folder / f"at-{tokens:015d}"
        if not final.exists():
            partial = self.folder / f".partial-{tokens}"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                save_tree(partial / "state", _stored(stream.state))
                with open(partial / "stream.json", "w") as file:
                    json.dump(host, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _sync(self.folder)
        for old in _snapshots(self.folder)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self._unsaved = 0

    def close(self) -> None:
        """Saves what has come since the last snapshot, and closes the texts."""
        try:
            self.save()
        finally:
            for file in self._texts:
                with contextlib.suppress(OSError):
                    file.close()


def saved_settings(folder: str | os.PathLike[str]) -> Settings:
    """What the stream in a folder was started with.

    Raises:
        ValueError: there is no saved stream, or one of another format.
    """
    return _read(_newest(pathlib.Path(folder)))[1]


def resume(
    folder: str | os.PathLike[str],
    lm: LanguageModel,
    *,
    steps_per_call: int = 1,
    sharding: Sharding | None = None,
) -> Stream:
    """The stream in a folder, as it was at its last snapshot. Cuts the texts back to there.

    Args:
        folder: where a `Recorder` kept it.
        lm: the same model; anything may have been made of the devices.
        steps_per_call: as for `Stream`; may differ from before.
        sharding: where the state goes; None: the first device.

    Raises:
        ValueError: no saved stream, another model, or a format that this version does not know.
    """
    folder = pathlib.Path(folder)
    newest = _newest(folder)
    host, settings = _read(newest)
    if host["model"] != lm.fingerprint():
        raise ValueError(
            f"the stream in {folder} belongs to another model than {lm.name} (their weights or "
            "sizes differ): resume it with the model, and the dtype, that it was started with"
        )
    stream = settings.new_stream(lm, steps_per_call=steps_per_call)
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    fresh, treedef = jax.tree.flatten(stream.state)
    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf in _stored(stream.state)
    ]
    stored = iter(restore_tree(newest / "state", abstract))
    # Copied, because the step donates its state: nobody else may own these buffers.
    leaves = [jnp.copy(next(stored)) if leaf.size else leaf for leaf in fresh]
    stream.state = jax.tree.unflatten(treedef, leaves)
    stream.rows = [_row_from_json(values, lm, settings.stop) for values in host["rows"]]
    for path, length in zip(_texts(folder, len(stream.rows)), host["text_bytes"], strict=True):
        if not path.exists() or path.stat().st_size < length:
            raise ValueError(f"{path} is shorter than the {length} bytes that were saved")
        os.truncate(path, length)
    return stream


def _stored(state: StreamState) -> list[jax.Array]:
    """What is written: the arrays that are not empty."""
    return [leaf for leaf in jax.tree.leaves(state) if leaf.size]


def _row_to_json(row: Row) -> dict:
    return dict(
        fed=row.fed,
        drawn=row.drawn,
        ended=row.ended,
        stops=row.stops.state(),
        detokenizer=row.detokenizer.state() if row.detokenizer else None,
    )


def _row_from_json(values: dict, lm: LanguageModel, stop: tuple[str, ...]) -> Row:
    held = values["detokenizer"]
    return Row(
        detokenizer=None if held is None else Detokenizer.from_state(lm.tokenizer, held),
        stops=StopStrings.from_state(stop, values["stops"]),
        fed=values["fed"],
        drawn=values["drawn"],
        ended=values["ended"],
    )


def _texts(folder: pathlib.Path, rows: int) -> list[pathlib.Path]:
    return [folder / f"text-{row}.txt" for row in range(rows)]


def _snapshots(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("at-*"))


def _newest(folder: pathlib.Path) -> pathlib.Path:
    found = _snapshots(folder)
    if not found:
        raise ValueError(f"there is no saved stream in {folder}")
    return found[-1]


def _read(snapshot: pathlib.Path) -> tuple[dict, Settings]:
    """What the host knew, and of it the settings."""
    try:
        host = json.loads((snapshot / "stream.json").read_text())
        if host["format"] != _FORMAT:
            raise ValueError(f"format {host['format']}, expected {_FORMAT}")
        return host, Settings.from_json(host["settings"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{snapshot} is not a saved stream: {error}") from error


def _sync(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
