"""Live streams on disk: the whole state of a stream, saved atomically, and resumed exactly.

A folder holds the text of each row so far (`text-0.txt`, …), appended to as it comes, and the
newest snapshots (`at-<tokens>`). A snapshot is written under a temporary name and renamed when
complete; it says how many bytes of text belong to it, and what lies behind them is cut off on
resume. So a stream can be killed at any moment, and goes on from its last snapshot.

What is saved does not depend on the devices: each KV head is there once, however many devices have
it. So a stream goes on on other devices than those that it was saved from. Of several processes,
all save and resume together, in a folder that all of them see; one writes the text.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.ring import Ring
from sinkjax.caches import FullCache, HeadSplit, PerLayer, Policy, SinkRing
from sinkjax.caches.heads import SplitHeads
from sinkjax.checkpoints.orbax import restore_tree, save_tree
from sinkjax.mesh import DATA, MODEL, agree, anywhere, is_main, together
from sinkjax.streaming.language_model import LanguageModel
from sinkjax.streaming.sampling import Sampling
from sinkjax.streaming.stream import Output, Row, Stream
from sinkjax.text.detokenize import Detokenizer, StopStrings

_FORMAT = 5
_KEPT = 2  # snapshots: the newest, and the one before it in case that a disk loses the newest
_POLICIES: dict[str, Callable[..., Policy]] = {
    policy.__name__: policy for policy in (SinkRing, FullCache, PerLayer, HeadSplit, SplitHeads)
}


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
            cache=_policy_to_json(self.cache),
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
        return cls(
            _policy_from_json(values["cache"]),
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
        ValueError: `every` < 1, the folder holds another stream, or the policy is none of this
            library.
        OSError: the folder can't be written.
        HostError: of several processes, all raise what one of them does.
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
        self._settings = Settings(
            stream.cache,
            stream.sampling,
            stream.seeds,
            stream.stop,
            stream.ignore_eos,
            extra or {},
        ).to_json()
        self._fingerprint = stream.lm.fingerprint()
        self._unsaved = 0
        self._texts: list[io.BufferedWriter] = []
        with together(f"preparing {self.folder}"):
            if is_main():
                self._open(resumed)

    def _open(self, resumed: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resumed and _snapshots(self.folder):
            raise ValueError(
                f"{self.folder} holds a saved stream already: resume it, or save to another folder"
            )
        for partial in self.folder.glob(".partial-*"):  # of a save that was killed
            shutil.rmtree(partial, ignore_errors=True)
        paths = _texts(self.folder, len(self.stream.rows))
        self._texts = [open(path, "ab" if resumed else "wb") for path in paths]

    def record(self, outputs: list[Output]) -> None:
        """Appends what one call gave; saves when it is time."""
        for file, out in zip(self._texts, outputs, strict=is_main()):
            file.write(out.text.encode())
        self._unsaved += max(len(out.tokens) for out in outputs)
        if self._unsaved >= self.every:
            self.save()

    def save(self) -> None:
        """Writes a snapshot. A failure raises, and leaves the one before as it was."""
        stream = self.stream
        tokens = sum(row.tokens for row in stream.rows)
        final = self.folder / f"at-{tokens:015d}"
        partial = self.folder / f".partial-{tokens}"
        with together(f"saving to {self.folder}"):
            for text in self._texts:
                text.flush()
                os.fsync(text.fileno())
        if not anywhere(is_main() and final.exists()):
            try:
                with together(f"saving to {self.folder}"):
                    if is_main():
                        shutil.rmtree(partial, ignore_errors=True)
                        partial.mkdir()
                save_tree(partial / "state", _stored(stream))
                with together(f"saving to {self.folder}"):
                    if is_main():
                        self._describe(partial)
                        os.replace(partial, final)
            except BaseException:
                if is_main():
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        with together(f"saving to {self.folder}"):
            if is_main():
                _sync(self.folder)
                for old in _snapshots(self.folder)[:-_KEPT]:
                    shutil.rmtree(old, ignore_errors=True)
        self._unsaved = 0

    def _describe(self, snapshot: pathlib.Path) -> None:
        """Writes what the host knows."""
        host = dict(
            format=_FORMAT,
            model=self._fingerprint,
            settings=self._settings,
            text_bytes=[text.tell() for text in self._texts],
            rows=[_row_to_json(row) for row in self.stream.rows],
        )
        with open(snapshot / "stream.json", "w") as file:
            json.dump(host, file)
            file.flush()
            os.fsync(file.fileno())

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
    return _found(pathlib.Path(folder))[2]


def resume(folder: str | os.PathLike[str], lm: LanguageModel, *, steps_per_call: int = 1) -> Stream:
    """The stream in a folder, as it was at its last snapshot. Cuts the texts back to there.

    Args:
        folder: where a `Recorder` kept it.
        lm: the same model, on any mesh; anything may have been made of the devices.
        steps_per_call: as for `Stream`; may differ from before.

    Raises:
        ValueError: no saved stream, another model, a format that this version does not know, or
            rows that do not divide over the mesh.
        HostError: of several processes, all raise what one of them does.
    """
    folder = pathlib.Path(folder)
    newest, host, settings = _found(folder)
    if host["model"] != lm.fingerprint():
        raise ValueError(
            f"the stream in {folder} belongs to another model than {lm.name} (their weights or "
            "sizes differ): resume it with the model, and the dtype, that it was started with"
        )
    stream = settings.new_stream(lm, steps_per_call=steps_per_call)
    fresh, treedef = jax.tree.flatten(stream.state)
    abstract = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in _stored(stream)
    ]
    for leaf in fresh:  # there may be no room for both
        if leaf.size:
            leaf.delete()
    stored = iter(restore_tree(newest / "state", abstract))
    # Copied, because the step donates its state: nobody else may own these buffers.
    leaves = [
        jnp.copy(_relabelled(next(stored), leaf.shape, leaf.sharding)) if leaf.size else leaf
        for leaf in fresh
    ]
    stream.state = jax.tree.unflatten(treedef, leaves)
    stream.rows = [_row_from_json(values, lm, settings.stop) for values in host["rows"]]
    with together(f"opening {folder}"):
        if is_main():
            _cut(_texts(folder, len(stream.rows)), host["text_bytes"])
    return stream


def _policy_to_json(value: Any) -> Any:
    """A policy, with those that it is made of, or one of their plain values."""
    if isinstance(value, tuple):
        return [_policy_to_json(x) for x in value]
    if not dataclasses.is_dataclass(value):
        return value
    name = type(value).__name__
    if _POLICIES.get(name) is not type(value):
        raise ValueError(
            f"a stream that remembers by {value} cannot be saved: expected one of "
            f"{', '.join(_POLICIES)}"
        )
    return {"policy": name, **{key: _policy_to_json(x) for key, x in vars(value).items()}}


def _policy_from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_policy_from_json, value))
    if not isinstance(value, dict):
        return value
    values = {key: _policy_from_json(x) for key, x in value.items()}
    return _POLICIES[values.pop("policy")](**values)


def _stored(stream: Stream) -> list[jax.Array]:
    """What is written: the arrays that are not empty, with each KV head once."""
    kv_heads, mesh = stream.lm.config.kv_heads, stream.lm.mesh

    def once(x):
        if not isinstance(x, Ring):
            return x
        return jax.tree.map(lambda y: _heads_once(y, kv_heads, mesh), x)

    state = jax.tree.map(once, stream.state, is_leaf=lambda x: isinstance(x, Ring))
    return [leaf for leaf in jax.tree.leaves(state) if leaf.size]


def _heads_once(x: jax.Array, kv_heads: int, mesh: Mesh | None) -> jax.Array:
    """An array `[B, heads, ...]` of a cache without the heads that are there for each of several
    devices: the devices that hold the same become copies of one shard."""
    if mesh is None or mesh.shape[MODEL] <= kv_heads:
        return x
    axis = mesh.axis_names.index(MODEL)
    sizes, names = list(mesh.devices.shape), list(mesh.axis_names)
    sizes[axis : axis + 1] = [kv_heads, -1]
    names.insert(axis + 1, "copies")
    sharding = NamedSharding(Mesh(mesh.devices.reshape(sizes), names), P(DATA, MODEL))
    return _relabelled(x, (x.shape[0], kv_heads, *x.shape[2:]), sharding)


def _relabelled(x: jax.Array, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """The same buffers on the same devices, as the shards of an array of another shape."""
    if x.shape == shape:
        return x
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _row_to_json(row: Row) -> dict:
    return dict(
        fed=row.fed,
        drawn=row.drawn,
        ended=row.ended,
        full=row.full,
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
        full=values["full"],
    )


def _texts(folder: pathlib.Path, rows: int) -> list[pathlib.Path]:
    return [folder / f"text-{row}.txt" for row in range(rows)]


def _snapshots(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("at-*"))


def _found(folder: pathlib.Path) -> tuple[pathlib.Path, dict, Settings]:
    with together(f"reading the stream in {folder}"):
        found = _snapshots(folder)
        if not found:
            raise ValueError(f"there is no saved stream in {folder}")
        host, settings = _read(found[-1])
    agree(f"the stream in {folder}", found[-1].name)
    return found[-1], host, settings


def _cut(texts: list[pathlib.Path], lengths: list[int]) -> None:
    for path, length in zip(texts, lengths, strict=True):
        if not path.exists() or path.stat().st_size < length:
            raise ValueError(f"{path} is shorter than the {length} bytes that were saved")
        os.truncate(path, length)


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
