"""Which backend serves a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax import Array
from jax.core import Tracer

Refusal = Callable[[], str | None]


def choose(
    op: str,
    backend: str | None,
    refusals: Mapping[str, Refusal],
    *,
    default: str,
    array: Array,
    interpret: object,
) -> str:
    """The backend of one call of an op.

    Args:
        op: its name, for messages.
        backend: the one that the caller names; None: the first that serves, else the default.
        refusals: by backend, best first: says why it can't serve this call, or None if it can.
            A backend named like a platform of jax ("tpu", "gpu") is chosen by itself there alone.
        default: what serves everywhere.
        array: an argument of the call. Under `jit` it does not say where it lies, and a kernel
            that is then compiled for another platform is refused by Pallas.
        interpret: not None: kernels are interpreted, on any platform.

    Raises:
        ValueError: the named backend is unknown, or can't serve; the message says why.
    """
    if backend is None:
        here = jax.default_backend()
        return next((b for b, why in refusals.items() if b == here and why() is None), default)
    if backend not in refusals:
        raise ValueError(f"{op} has the backends {', '.join(refusals)}, got {backend!r}")
    if why := refusals[backend]():
        raise ValueError(f"{op}: backend {backend!r} can't serve this call: {why}")
    if backend in ("tpu", "gpu") and interpret is None and not isinstance(array, Tracer):
        platforms = sorted({device.platform for device in array.devices()})
        if platforms != [backend]:
            raise ValueError(
                f"{op}: backend {backend!r} can't serve this call: the arrays are on "
                f"{' and '.join(platforms)}; leave backend out, or name 'reference'"
            )
    return backend
