"""From the arrays of an op to the backend that serves them."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.backends import choose
from pallas_kernels.flash.call import Call, Inputs, Places
from pallas_kernels.flash.pairs import bound
from pallas_kernels.flash.rule import Rule, block_map, most_blocks
from pallas_kernels.flash.vjp import attention as differentiable
from pallas_kernels.tuning import tuned


def attention(
    op: str,
    x: Inputs,
    *,
    rule: Rule,
    places: tuple[Array, Array, Array, Array | None],
    own: bool,
    packed: bool = False,
    out_dtype: Any,
    backend: str | None,
    block_sizes: tuple[int, int] | None,
    interpret: Any,
) -> tuple[Array, Array]:
    """Attention under a rule, on the backend named or the best.

    Args:
        places: `q_ticks`, `k_ticks`, `q_starts` and `slopes` of `Places`.
        own: the keys are the chunk's own and those right before it, their ticks in order; else
            they are a ring's.
        packed: sequences begin anywhere in the chunk.
    """
    q_ticks, k_ticks, q_starts, slopes = places
    T, K = x.q.shape[2], x.k.shape[2]

    def call(name: str) -> Call:
        block_q, block_k = block_sizes or sizes(name, x)
        most = most_blocks(rule, T, K, block_q, block_k) if own else -(-K // block_k)
        pairs = bound(rule, T, K, block_q, block_k, own=own, packed=packed)
        return Call(rule, block_q, block_k, most, out_dtype, interpret, pairs, not packed)

    name = choose(op, backend, refusals(x, call), default="xla", array=x.q, interpret=interpret)
    chosen = call(name)
    blocks = block_map(rule, q_ticks, k_ticks, q_starts, chosen.block_q, chosen.block_k)
    where = Places(q_ticks, k_ticks, q_starts, slopes, blocks[:, None])
    return differentiable(name, chosen, x, where)


def refusals(x: Inputs, call) -> dict:
    """Of each backend, whether it refuses (see `choose`)."""

    def ask(name: str):
        return lambda: importlib.import_module(f"pallas_kernels.flash.{name}").refuses(
            call(name), x
        )

    return {"tpu": ask("tpu"), "gpu": ask("gpu"), "xla": _serves, "reference": _serves}


def _serves() -> None:
    return None


def sizes(backend: str, x: Inputs) -> tuple[int, int]:
    """Queries and keys that a backend takes at a time: tuned for this device, or its default."""
    here = "xla" if jax.default_backend() == "cpu" else jax.default_backend()
    found = tuned("flash", x.q.shape[3], x.q.dtype) if backend == here else None
    if found is not None:
        return found[0], found[1]
    if backend in ("tpu", "gpu"):
        module = importlib.import_module(f"pallas_kernels.flash.{backend}")
        return module.block_sizes(x.q.shape[3], jnp.dtype(x.q.dtype))
    return 256, 256
