"""Patterns of retrieval heads on disk, in the format that DuoAttention's authors publish."""

import json
import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from sinkjax.files import replaced

_TABLE, _SETTINGS = "full_attention_heads.tsv", "config.json"


def read_gates(path: str | os.PathLike[str]) -> Float[np.ndarray, "layers kv_heads"]:
    """The gate of each KV head, in [0, 1], float64: 1 where it needs all tokens.

    Args:
        path: of a table, a line a layer, a tab between heads; or of the folder that holds it as
            `full_attention_heads.tsv`.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    file = Path(path)
    if file.is_dir():
        file /= _TABLE
    rows = [line.split("\t") for line in file.read_text().splitlines() if line.strip()]
    try:
        gates = np.asarray([[float(x) for x in row] for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"{file} is no table of numbers, a line a layer: {error}") from error
    if gates.ndim != 2 or not gates.size or not np.isfinite(gates).all():
        raise ValueError(f"{file} is no table of numbers, a line a layer and a column a KV head")
    return np.clip(gates, 0, 1)


def write_gates(
    path: str | os.PathLike[str], gates: Float[np.ndarray, "layers kv_heads"], **settings: int
) -> None:
    """Writes a folder that `read_gates`, and the original project, read.

    Args:
        path: of the folder; made if absent.
        gates: see `read_gates`.
        settings: `sink_size` and `recent_size`, of the streaming heads when the gates were trained.

    Raises:
        OSError: it can't be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    table = "".join("\t".join(f"{x:.6f}" for x in row) + "\n" for row in gates)
    for name, text in ((_TABLE, table), (_SETTINGS, json.dumps(settings, indent=2) + "\n")):
        with replaced(folder / name) as part:
            part.write_text(text)


def retrieval_heads(
    gates: Float[np.ndarray, "layers kv_heads"], sparsity: float
) -> Bool[np.ndarray, "layers kv_heads"]:
    """The pattern in which a share of the heads streams: those with the lowest gates.

    Args:
        gates: see `read_gates`.
        sparsity: the share of heads that stream, in [0, 1], over all layers together. Of equal
            gates, those of later layers stream first.

    Raises:
        ValueError: sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity, the share of heads that stream, must be in [0, 1]: {sparsity}")
    # As many as reach the quantile of the original code.
    count = 0 if sparsity == 1 else gates.size - math.ceil(sparsity * (gates.size - 1))
    pattern = np.zeros(gates.size, bool)
    pattern[np.argsort(-gates.reshape(-1), kind="stable")[:count]] = True
    return pattern.reshape(gates.shape)
