"""Files that are whole, or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; what was written there takes its name in the end. Where
    something was raised before, `path` stays what it was, and nothing is left beside it.

    Raises:
        OSError: it can't be renamed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
