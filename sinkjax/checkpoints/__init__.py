"""Where weights come from and go to. One function opens whatever it is."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from sinkjax.checkpoints import builtin, gguf, hub, orbax, safetensors
from sinkjax.mesh import together
from sinkjax.models import Config, Decoder
from sinkjax.text.tokenizer import Tokenizer

__all__ = ["Loaded", "open_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, ready to run.

    Attributes:
        config: its sizes.
        model: with its weights.
        tokenizer: None where the checkpoint has none.
        name: a short one, for people.
    """

    config: Config
    model: Decoder
    tokenizer: Tokenizer | None
    name: str


def open_checkpoint(
    source: str,
    *,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    weight_dtype: str | None = None,
) -> Loaded:
    """Opens a model by name or path.

    Args:
        source: a built-in name (`smollm2-135m-instruct`), the path of a `.gguf` file, a folder
            (Hugging Face safetensors, or what `sinkjax.convert` wrote), or a hub id `org/name`.
        dtype: that the weights are cast to.
        mesh: the devices to spread them over; None: one.
        weight_dtype: of the matrices; see `Decoder`.

    Raises:
        OSError: a file is missing or unreadable, or a download failed.
        ValueError: `source` is none of these, or what it names is corrupt or not supported.
    """
    with together(f"opening {source}"):
        path, name, load = _found(source)
        try:
            return Loaded(*load(path, dtype, mesh, weight_dtype), name=name)
        except ValueError as error:
            raise ValueError(f"cannot open {source}: {error}") from error


def _found(
    source: str,
) -> tuple[Path, str, Callable[..., tuple[Config, Decoder, Tokenizer | None]]]:
    """Where a model is, its name, and what loads it."""
    path = Path(source)
    if source in builtin.MODELS:
        return builtin.fetch_model(source), source, gguf.load
    if path.is_file() and path.suffix == ".gguf":
        return path, path.stem, gguf.load
    if path.is_dir() and (path / orbax.MANIFEST).is_file():
        return path, path.resolve().name, orbax.load_model
    if path.is_dir() and (path / "config.json").is_file():
        return path, path.resolve().name, safetensors.load
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.gguf)", source):
        return hub.fetch(source), source, safetensors.load
    raise ValueError(
        f"no model at {source!r}: expected a built-in name ({', '.join(builtin.MODELS)}), "
        "the path of a .gguf file, a folder with config.json and safetensors or one that "
        "sinkjax.convert wrote, or a hub id such as org/name"
    )
