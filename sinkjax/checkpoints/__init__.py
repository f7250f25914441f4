"""Where weights come from and go to. One function opens whatever it is."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp

from sinkjax.checkpoints import builtin, gguf, hub, orbax, safetensors
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


def open_checkpoint(source: str, *, dtype=jnp.float32) -> Loaded:
    """Opens a model by name or path.

    Args:
        source: a built-in name (`smollm2-135m-instruct`), the path of a `.gguf` file, a folder
            (Hugging Face safetensors, or what `sinkjax.convert` wrote), or a hub id `org/name`.
        dtype: that the weights are cast to.

    Raises:
        OSError: a file is missing or unreadable, or a download failed.
        ValueError: `source` is none of these, or what it names is corrupt or not supported.
    """
    path = Path(source)
    if source in builtin.MODELS:
        name, load, path = source, gguf.load, builtin.fetch_model(source)
    elif path.is_file() and path.suffix == ".gguf":
        name, load = path.stem, gguf.load
    elif path.is_dir() and (path / orbax.MANIFEST).is_file():
        name, load = path.resolve().name, orbax.load_model
    elif path.is_dir() and (path / "config.json").is_file():
        name, load = path.resolve().name, safetensors.load
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.gguf)", source):
        name, load, path = source, safetensors.load, hub.fetch(source)
    else:
        raise ValueError(
            f"no model at {source!r}: expected a built-in name ({', '.join(builtin.MODELS)}), "
            "the path of a .gguf file, a folder with config.json and safetensors or one that "
            "sinkjax.convert wrote, or a hub id such as org/name"
        )
    try:
        return Loaded(*load(path, dtype), name=name)
    except ValueError as error:
        raise ValueError(f"cannot open {source}: {error}") from error
