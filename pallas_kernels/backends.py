"""Which backend serves a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

Refusal = Callable[[], str | None]


def choose(op: str, backend: str | None, refusals: Mapping[str, Refusal], default: str) -> str:
    """The backend of one call of an op.

    Args:
        op: its name, for messages.
        backend: the one that the caller names; None: the first that serves, else the default.
        refusals: by backend, best first: says why it can't serve this call, or None if it can.
            A backend named like a platform of jax ("tpu", "gpu") is chosen by itself there alone.
        default: what serves everywhere.

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
    return backend
