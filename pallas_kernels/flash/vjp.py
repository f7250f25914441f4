"""One differentiable op from a backend's two passes."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash import reference
from pallas_kernels.flash.call import Call, Inputs, Places


def attention(backend: str, call: Call, x: Inputs, places: Places) -> tuple[Array, Array]:
    """The output `[B, H, T, D]` and the log-sum-exp `[B, H, T]`, float32, by the named backend.
    Gradients flow to `x`."""
    if backend == "reference" and x.k_scale is None:
        return reference.forward(call, x, places)
    return _attention(backend, call, x, places)


def _module(backend: str):
    return importlib.import_module(f"pallas_kernels.flash.{backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(backend, call, x, places):
    return _module(backend).forward(call, x, places)


def _forward(backend, call, x, places):
    if x.k_scale is not None:
        raise ValueError(
            f"attention has no gradients with a ring of {x.k.dtype.name}: what was rounded to the "
            "steps of a grid has none. Use a ring of floats."
        )
    out, lse = _module(backend).forward(call, x, places)
    return (out, lse), (x, places, out, lse)


def _backward(backend, call, saved, gradients):
    x, places, out, lse = saved
    dout, dlse = gradients
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    grads = _module(backend).backward(call, x, places, lse, delta, dout)
    grads = jax.tree.map(lambda g, a: g.astype(a.dtype), grads, x)
    return grads, None


_attention.defvjp(_forward, _backward)


def merged(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """One softmax over the keys of several calls, from the output and log-sum-exp of each."""
    if len(parts) == 1:
        return parts[0]
    peak = functools.reduce(jnp.maximum, (lse for _, lse in parts))
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
    shares = [jnp.exp(lse - peak) for _, lse in parts]
    total = functools.reduce(jnp.add, shares)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    weighted = (o * (s / total)[..., None] for (o, _), s in zip(parts, shares, strict=True))
    out = functools.reduce(jnp.add, weighted)
    return out, jnp.where(some, peak + jnp.log(total), -jnp.inf)
