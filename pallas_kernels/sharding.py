"""The ops on a mesh: XLA does not partition kernels by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.ring import Ring


def sharded(
    op: Callable, mesh: Mesh, *, batch: str | None = None, heads: str | None = None
) -> Callable:
    """An op that each device runs on its own rows and heads. Nothing is communicated.

    Args:
        op: `sink_attention`, `ring_decode` or `block_sparse_attention`.
        mesh: of devices.
        batch: the mesh axis over which rows are spread; None: every device has all.
        heads: the mesh axis over which query heads and KV heads are spread; None: as before.

    Returns:
        A function of the arguments of `op`.

    Raises:
        ValueError: called with rows or heads that the axis does not divide.
    """
    ring = (P(batch, heads, None, None),) * 2 + (P(batch, heads),) * 2
    tokens = P(batch, None, heads, None)
    specs = dict(
        q=tokens,
        k=tokens,
        v=tokens,
        q_sinks=tokens,
        ticks=P(batch),
        segment_ids=P(batch, None),
        sink_logits=P(heads),
        alibi_slopes=P(heads),
    )

    def held(r: Ring) -> Any:
        specs: list[Any] = [None if x is None else s for x, s in zip(r, ring, strict=True)]
        return Ring(*specs)

    def call(*args, **kwargs):
        given = inspect.signature(op).bind(*args, **kwargs).arguments
        arrays: dict[str, Any] = {n: x for n, x in given.items() if isinstance(x, Array | Ring)}
        rest = {n: x for n, x in given.items() if n not in arrays}
        for axis, sizes in (
            (batch, (given["q"].shape[0],)),
            (heads, (given["q"].shape[2], given["k"].shape[2])),
        ):
            if axis is not None and any(size % mesh.shape[axis] for size in sizes):
                what = "rows" if axis == batch else "query heads and KV heads"
                raise ValueError(
                    f"{op.__name__}: {' and '.join(map(str, sizes))} {what} do not divide over "
                    f"the {mesh.shape[axis]} devices of mesh axis {axis!r}"
                )
        in_specs: dict[str, Any] = {n: specs.get(n) for n in arrays}
        if "ring" in arrays:
            in_specs["ring"] = held(arrays["ring"])
        if "blocks" in arrays:
            rows, lists = arrays["blocks"].shape[:2]
            in_specs["blocks"] = P(batch if rows > 1 else None, heads if lists > 1 else None)

        def local(arrays):
            return op(**arrays, **rest)

        def out_spec(x):
            if isinstance(x, Ring):
                return held(x)
            return tokens if x.ndim == 4 else P(batch, None, heads)

        out = jax.eval_shape(lambda a: op(**a, **{**rest, "backend": "reference"}), arrays)
        out_specs = jax.tree.map(out_spec, out, is_leaf=lambda x: isinstance(x, Ring))
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False
        )
        return run(arrays)

    return call
