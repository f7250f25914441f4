"""Block sizes by kind of device, as data: `<device>/<op>.json`, written by `scripts/tune.py`.

A file maps `<head_dim>-<dtype>` to the sizes that were fastest. Where there is none, a backend's
own default holds.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def folder() -> pathlib.Path:
    """Of the device at hand (a chip that is compiled for ahead of time has none)."""
    kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    return pathlib.Path(__file__).parent / kind


def key(head_dim: int, dtype: DTypeLike) -> str:
    return f"{head_dim}-{jnp.dtype(dtype).name}"


def tuned(op: str, head_dim: int, dtype: DTypeLike) -> tuple[int, ...] | None:
    """The sizes for an op (`"flash"`, `"ring_decode"`) on the device at hand, or None."""
    sizes = _table(folder() / f"{op}.json").get(key(head_dim, dtype))
    return None if sizes is None else tuple(sizes)


@functools.cache
def _table(path: pathlib.Path) -> dict[str, list[int]]:
    return json.loads(path.read_text()) if path.exists() else {}
