"""Saves and restores trees of arrays, and converted models. The only module that knows Orbax.

Orbax's synchronous v0 checkpointer: as quick as v1, while a save that fails in v1 leaves threads
behind that wait for its directory.

Of several processes, all save and restore together, in a folder that all of them see: each writes
the shards that it holds.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh

from sinkjax.checkpoints.safetensors import read_json
from sinkjax.mesh import is_main, several, together
from sinkjax.models import Config, Decoder
from sinkjax.text.tokenizer import Tokenizer

MANIFEST = "sinkjax.json"
_FORMAT = 1


def save_tree(path: str | Path, tree: Any) -> None:
    """Writes a pytree of arrays to a folder, in place of an earlier one.

    A save that fails, or is killed, leaves the earlier one as it was: the folder is written inside
    `<path>.partial` and then renamed. A kill between the two renames that this takes
    leaves the earlier one as `<path>.previous`, where `restore_tree` finds it.

    Args:
        path: of the folder.
        tree: of non-empty arrays, jax's or numpy's, in containers of any kind. What each of
            several processes has by itself must be the same in all, and is taken from one.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an array is empty, or two have the same path in the tree.
    """
    leaves = _named(tree)
    if empty := [name for name, x in leaves.items() if jnp.size(x) == 0]:
        raise ValueError(f"empty arrays cannot be saved: {', '.join(empty)}")
    if several():  # Orbax writes arrays of all processes, or numpy's
        leaves = {n: np.asarray(x) if _own(x) else x for n, x in leaves.items()}

    def write(new: Path) -> None:
        try:
            # Uncompressed: random mantissas shrink by a third and take four times as long.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(new, leaves)
        except ValueError as error:  # what tensorstore makes of a full disk
            raise OSError(f"cannot save {path}: {error}") from error

    _replace(Path(path).absolute(), write)


def restore_tree(path: str | Path, abstract: Any) -> Any:
    """The tree that `save_tree` wrote.

    Args:
        path: of the folder.
        abstract: a tree of the same structure, of `jax.ShapeDtypeStruct`s or arrays: the dtypes
            to cast to and the shardings to restore with, whatever devices the tree was saved
            from. Each process reads its own shards. Without a sharding, an array goes to the
            default device (of every process).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is corrupt, or holds other arrays: all differences are listed.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in _named(abstract).items()
    }
    with together(f"reading {path}"):
        path = _there(path)
        stored = _metadata(path)
        wrong = [f"missing: {name}" for name in wanted.keys() - stored.keys()]
        wrong += [f"surplus: {name}" for name in stored.keys() - wanted.keys()]
        wrong += [
            f"misshapen: {name} is {stored[name].shape}, expected {wanted[name].shape}"
            for name in wanted.keys() & stored.keys()
            if tuple(stored[name].shape) != wanted[name].shape
        ]
        if wrong:
            listed = "\n  ".join(sorted(wrong))
            raise ValueError(f"{path} does not hold the tree that was asked for:\n  {listed}")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            leaves = checkpointer.restore(path, wanted)
    except (ValueError, KeyError, OSError) as error:
        raise _corrupt(path, error) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])


class Tensors(Mapping[str, np.ndarray]):
    """The arrays that `save_tree` wrote, by name, each read when it is asked for.

    Read by tensorstore, as Orbax does: Orbax itself takes 12 to 26 ms for one array, whatever its
    size, where this takes 1.

    Args:
        path: of the folder.

    Attributes:
        shapes: by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is corrupt.
    """

    def __init__(self, path: str | Path):
        self._path = _there(path)
        self.shapes = {name: tuple(x.shape) for name, x in _metadata(self._path).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        at = {"driver": "ocdbt", "base": f"file://{self._path}", "path": f"{name}/"}
        try:
            stored = tensorstore.open({"driver": "zarr", "kvstore": at}, read=True, open=True)
            x = stored.result().read().result()
        except (ValueError, OSError) as error:
            raise _corrupt(self._path, error) from error
        assert x.shape == shape
        return x

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def save_model(
    path: str | Path, config: Config, model: Decoder, tokenizer: Tokenizer | None
) -> None:
    """Writes a model to a folder of its own: weights, config and tokenizer.

    The folder appears when it is whole, and not at all when something fails.

    Raises:
        FileExistsError: there is something at `path` already.
        OSError: the folder cannot be written.
        ValueError: the model's weights are kept in 8 bits.
    """
    path = Path(path).absolute()
    if model.weight_dtype is not None:
        raise ValueError(
            f"a model with {model.weight_dtype} weights is not saved: save it as it was loaded "
            "without weight_dtype, and give weight_dtype when the folder is loaded"
        )
    check_new(path)

    def write(new: Path) -> None:
        save_tree(new / "weights", model.weights())
        if not is_main():
            return
        if tokenizer is not None:
            tokenizer.save(new)
        manifest = {"format": _FORMAT, "config": config.to_json()}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    _replace(path, write)


def check_new(path: Path) -> None:
    """Raises FileExistsError where `path` is anything but an empty folder, or nothing."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder: remove it first")


def load_model(
    path: str | Path, dtype=jnp.float32, mesh: Mesh | None = None, weight_dtype: str | None = None
) -> tuple[Config, Decoder, Tokenizer | None]:
    """The model, and the tokenizer if there is one, that `save_model` wrote.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the folder is corrupt, or of a newer format.
    """
    path = Path(path)
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"{path / MANIFEST} has format {manifest.get('format')!r}, expected {_FORMAT}: "
            "convert the model again with this version of sinkjax"
        )
    try:
        config = Config.from_json(manifest["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} holds no config: {error}") from error
    weights = Tensors(path / "weights")
    tokenizer = None
    if (file := path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(file)
    return config, Decoder.from_weights(config, weights, dtype, mesh, weight_dtype), tokenizer


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their path. A flat dict, so that Orbax never meets a container of ours."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of the tree have the same path: rename one")
    return named


def _own(x: Any) -> bool:
    """Whether this process has all of the array, and it is not spread over others."""
    return isinstance(x, jax.Array) and x.is_fully_addressable


def _there(path: str | Path) -> Path:
    """The folder, or the earlier one that a kill left beside it."""
    path = Path(path).absolute()
    if not path.is_dir() and (previous := _beside(path, "previous")).is_dir():
        path = previous
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
    return path


def _metadata(path: Path) -> dict[str, Any]:
    """Shape and dtype of each array."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata
            if stored is None:  # Orbax only logs why
                raise ValueError("its metadata cannot be read")
            return stored.tree
    except (ValueError, KeyError, OSError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is a corrupt or truncated checkpoint: {error}")


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Has a folder written elsewhere, then puts it in the place of `path`. Of several processes
    all write, and one renames."""
    partial, previous = _beside(path, "partial"), _beside(path, "previous")
    with together(f"saving {path}"):
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
            partial.mkdir(parents=True)
    try:
        with together(f"saving {path}"):
            write(partial / "new")
        with together(f"saving {path}"):
            if is_main():
                if path.is_dir():
                    shutil.rmtree(previous, ignore_errors=True)
                    os.rename(path, previous)
                os.rename(partial / "new", path)
    finally:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
    if is_main():
        shutil.rmtree(previous, ignore_errors=True)
