"""Parts that the Mosaic GPU kernels share: products of tiles, masks, scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash.gpu_tiles import ROWS
from pallas_kernels.flash.rule import Rule

LOG2E = math.log2(math.e)
HIDDEN = -1e30  # a running maximum that no score of a key undercuts, and that is no NaN less itself


def product(a, b, interpret: Any, meanwhile: Callable = lambda: None) -> Array:
    """a · b, both in shared memory: `[M, K]` and `[K, N]`, float32.

    Args:
        meanwhile: what to do while the tensor cores work.
    """
    if interpret is not None:
        done = _interpreted(a, b)
        meanwhile()
        return done

    def body(total):
        plgpu.wgmma(total, a, b)
        meanwhile()
        return total[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def product_pair(first, second, interpret: Any, between: Callable):
    """The products of two pairs of operands in shared memory: `between` of the first product,
    computed while the second is under way, and the second. With None for a second pair,
    `between` of the first alone."""
    if second is None:
        return between(product(first[0], first[1], interpret))
    if interpret is not None:
        return between(_interpreted(*first)), _interpreted(*second)

    def body(one, two):
        plgpu.wgmma(one, *first)
        plgpu.wgmma(two, *second)
        done = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
        return done, plgpu.wgmma_accumulator_load(two, wait_n=0)

    shapes = [(a.shape[0], b.shape[1]) for a, b in (first, second)]
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def add_products(
    sums: list[tuple[Array, Array, Any]], interpret: Any, meanwhile: Callable = lambda: None
) -> list[Array]:
    """Of each (total, a, b), total + a · b, with `a` in registers and `b` in shared memory."""
    if interpret is not None:
        meanwhile()
        return [total + _interpreted(a, b) for total, a, b in sums]

    def body(totals):
        for total, (_, a, b) in zip(totals, sums, strict=True):
            plgpu.wgmma(total, a, b)
        meanwhile()

    return pl.run_state(body)([plgpu.ACC.init(total) for total, _, _ in sums])


def _interpreted(a, b) -> Array:
    """a · b where there are no tensor cores.

    Interpret mode (jax 0.12.0) checks no read of a wgmma for races, and has none with an operand or
    a start in registers. It does check plain reads; the commit says that these, like those of a
    wgmma, are ordered with TMA.
    """
    done = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return done


def zeros(columns: int) -> Array:
    """What a warpgroup's products are added to."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def registers(warpgroups: int, *, computes: bool) -> None:
    """Moves registers from the warpgroup that brings tiles to the two that compute."""
    if warpgroups == 2:
        plgpu.set_max_registers(
            232 if computes else 40, action="increase" if computes else "decrease"
        )


def next_slot(n: Array, ring, free) -> Array:
    """The slot of the n-th tile in a ring of tiles, once it is free."""
    slot = lax.rem(n, ring.shape[0])

    @pl.when(n >= ring.shape[0])
    def wait():
        plgpu.barrier_wait(free.at[slot])

    return slot


def bias_of(seat: Array, ticks: Array, shape: tuple[int, int], q_axis: int, slope: Array) -> Array:
    """ALiBi's bias times log2(e): seats lie along `q_axis`, ticks along the other."""
    far = over(seat, shape, q_axis) - over(ticks, shape, 1 - q_axis)
    return far.astype(jnp.float32) * (slope * LOG2E)


def over(vector: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A vector along an axis of a matrix."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def along(axis: int):
    """The layout of a vector that runs along an axis of a product."""
    return plgpu.Layout.WGMMA.reduce(1 - axis)


def mask(bounds: list[tuple[Array, Array]], ticks: Array, shape: tuple[int, int], q_axis: int):
    """Where queries see keys. Bounds lie along `q_axis`, ticks along the other."""
    ticks = over(ticks, shape, 1 - q_axis)
    seen = [
        (ticks >= over(first, shape, q_axis)) & (ticks <= over(last, shape, q_axis))
        for first, last in bounds
    ]
    return functools.reduce(jnp.logical_or, seen)


def log2_factor(rule: Rule, biased: bool) -> float:
    """What `scores` leaves to be multiplied with, to be fused into the exponent."""
    return 1.0 if biased or rule.soft_cap is not None else rule.scale * LOG2E


def scores(rule: Rule, products: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """Scores times log2(e) / `log2_factor`; and their slope over the capped product (None: 1).

    Args:
        bias: ALiBi's, less which a score is.
    """
    s, slope = products, None
    if rule.soft_cap is not None:
        # tanh.approx errs by 5e-4, too much times a cap of 50; this tanh by 3e-7. 1 / x as
        # rsqrt(x)² is one fast instruction, where a division is ten.
        e = jnp.exp2(s * (2 * LOG2E * rule.scale / rule.soft_cap))
        root = lax.rsqrt(1 + e)
        bent = 1 - 2 * (root * root)
        s, slope = bent * (rule.soft_cap * LOG2E), 1 - bent * bent
    elif bias is not None:
        s = s * (rule.scale * LOG2E)
    return (s if bias is None else s - bias), slope


def kernel(body, interpret, **arguments):
    """`plgpu.kernel` as all kernels here use it."""
    return plgpu.kernel(
        body,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        **arguments,
    )
