"""Checks that the ops share. Each raises `ValueError` and names the op and the values."""

from __future__ import annotations

from jax import Array

from pallas_kernels.ring import Ring


def check_heads(op: str, q: Array, k: Array, v: Array, q_sinks: Array | None) -> None:
    """q `[B, T, H, D]`, k and v `[B, K, Hkv, D]`, Hkv divides H, q_sinks as q."""
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and q.shape[2] % k.shape[2] == 0
        and 0 not in q.shape + k.shape
    )
    if not fits:
        raise ValueError(
            f"{op}: queries [B, T, H, D] = {q.shape} do not fit keys {k.shape} and values "
            f"{v.shape} [B, T, Hkv, D]: B and D must be the same, and H a multiple of Hkv"
        )
    if q_sinks is not None and q_sinks.shape != q.shape:
        raise ValueError(f"{op}: q_sinks {q_sinks.shape} must have the shape of q, {q.shape}")


def check_options(
    op: str,
    q: Array,
    sinks: int,
    window: int | None,
    sink_logits: Array | None,
    alibi_slopes: Array | None,
) -> None:
    """S ≥ 0, W ≥ 1 or None, one logit and one slope a head."""
    if sinks < 0:
        raise ValueError(f"{op}: sinks must be ≥ 0, got {sinks}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be ≥ 1 or None, got {window}")
    for name, array in dict(sink_logits=sink_logits, alibi_slopes=alibi_slopes).items():
        if array is not None and array.shape != q.shape[2:3]:
            raise ValueError(f"{op}: {name} {array.shape} must be [H] = {q.shape[2:3]}")


def check_ring(
    op: str,
    ring: Ring,
    ticks: Array,
    batch: int,
    kv_heads: int,
    head_dim: int,
    sinks: int,
    window: int | None,
) -> None:
    """k and v `[B, Hkv, S + W, D]`, ticks `[B]`, scales `[B, Hkv, S + W]` with integers alone."""
    if window is None:
        raise ValueError(f"{op}: a ring needs a window")
    shape = (batch, kv_heads, sinks + window, head_dim)
    if ring.k.shape != shape or ring.v.shape != shape or ring.k.dtype != ring.v.dtype:
        raise ValueError(
            f"{op}: the ring's keys {ring.k.dtype}{ring.k.shape} and values "
            f"{ring.v.dtype}{ring.v.shape} must be [B, Hkv, sinks + window, D] = {shape}"
        )
    if ticks.shape != (batch,):
        raise ValueError(f"{op}: ticks {ticks.shape} must be [B] = {(batch,)}")
    whole = ring.k.dtype.name in ("int8", "int4")
    for name, scale in dict(k_scale=ring.k_scale, v_scale=ring.v_scale).items():
        if whole != (scale is not None) or (whole and scale.shape != shape[:3]):
            got = None if scale is None else scale.shape
            expected = shape[:3] if whole else None
            raise ValueError(
                f"{op}: a ring of {ring.k.dtype.name} needs {name} {expected}, got {got}"
            )
    if ring.k.dtype.name == "int4" and head_dim % 2:
        raise ValueError(f"{op}: int4 needs an even head_dim, got {head_dim}")
