"""Converts a model to a folder of its own: weights (Orbax), config and tokenizer.

Usage: python -m sinkjax.convert SRC DST [--dtype float32|bfloat16]

SRC is whatever `sinkjax.checkpoints.open_checkpoint` opens: a built-in name, a .gguf file, a
folder, or a hub id. DST must not exist; it appears when it is whole.
"""

import dataclasses
import time
from pathlib import Path

import jax
from absl import app, flags

from sinkjax import cli
from sinkjax.checkpoints import open_checkpoint, orbax


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did."""

    parameters: int
    size: int  # of the new folder, in bytes
    seconds: float


def convert(source: str, destination: str | Path, *, dtype: str = "float32") -> Report:
    """Opens a model, and saves it to a new folder.

    Args:
        source: see `open_checkpoint`.
        destination: of the folder.
        dtype: of the saved weights.

    Raises:
        FileExistsError: there is something at `destination` already.
        OSError, ValueError: see `open_checkpoint`.
    """
    start, destination = time.perf_counter(), Path(destination)
    orbax.check_new(destination)
    loaded = open_checkpoint(source, dtype=dtype)
    orbax.save_model(destination, loaded.config, loaded.model, loaded.tokenizer)
    return Report(
        parameters=sum(x.size for x in jax.tree.leaves(loaded.model)),
        size=sum(file.stat().st_size for file in destination.rglob("*") if file.is_file()),
        seconds=time.perf_counter() - start,
    )


def main(argv: list[str]) -> None:
    """See `cli.run`."""
    if len(argv) != 2:
        raise app.UsageError(f"expected SRC and DST, got {len(argv)} arguments")
    report = convert(*argv, dtype=flags.FLAGS.dtype)
    print(
        f"{argv[1]}: {report.parameters:,} parameters, {report.size:,} bytes, "
        f"{report.seconds:.1f} s"
    )


if __name__ == "__main__":
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the saved weights")
    cli.run(main)
