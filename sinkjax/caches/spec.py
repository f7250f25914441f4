"""Cache policies as short text, the same for every command."""

import dataclasses
import re
from pathlib import Path
from typing import cast

from sinkjax.caches.full import FullCache
from sinkjax.caches.heads import HeadSplit, SplitHeads
from sinkjax.caches.pattern import read_gates, retrieval_heads
from sinkjax.caches.protocol import KV_DTYPES, LayerPolicy, PerLayer, Policy
from sinkjax.caches.ring import SinkRing

_KINDS = """expected one of
  ring:SINKS+WINDOW                       attention sinks and a window, for streams without end
  full:TOKENS                             everything, up to so many tokens
  duo:PATTERN@SPARSITY,SINKS+WINDOW,TOKENS  retrieval heads full, the others a ring; the pattern is
                                          a table of gates, the sparsity the share that streams
each with ,int8 or ,int4 (or ,bfloat16, ,float32) behind it for quantised keys and values, and a
ring with ,absolute for sinks at their own positions; such as ring:4+1020 or full:8192,int8"""


def parse_policy(spec: str, *, tokens: int | None = None) -> Policy:
    """The policy that a text describes.

    Args:
        spec: `ring:4+1020`, `full:8192,int8`, `duo:pattern.tsv@0.5,64+256,131072,int4`, ….
        tokens: how many a full cache holds where the text does not say.

    Raises:
        OSError: the file of a pattern can't be read.
        ValueError: it describes none, or one with a value out of range.
    """
    match = re.fullmatch(r"(ring|full|duo)(?:[:,](.*))?", spec)
    if match is None:
        raise ValueError(f"no cache policy {spec!r}: {_KINDS}")
    kind = match[1]
    first, *options = (part.strip() for part in (match[2] or "").split(","))
    ring, capacity, kv_dtype, absolute = None, tokens, None, False
    for option in [*options, *([] if kind == "duo" else [first])]:
        if span := re.fullmatch(r"(\d+)\+(\d+)", option):
            ring = int(span[1]), int(span[2])
        elif option.isdecimal():
            capacity = int(option)
        elif option in KV_DTYPES:
            kv_dtype = option
        elif option == "absolute" and kind == "ring":
            absolute = True
        elif option:
            raise ValueError(f"{option!r} in cache policy {spec!r} says nothing: {_KINDS}")
    if kind == "ring":
        if ring is None or capacity != tokens:
            raise ValueError(f"cache policy {spec!r} needs SINKS+WINDOW: {_KINDS}")
        return SinkRing(*ring, positions="absolute" if absolute else "cache", kv_dtype=kv_dtype)
    if capacity is None:
        raise ValueError(f"cache policy {spec!r} must say how many tokens it holds: {_KINDS}")
    full = FullCache(capacity, kv_dtype=kv_dtype)
    if kind == "full":
        if ring is not None:
            raise ValueError(f"cache policy {spec!r} holds everything, and has no ring: {_KINDS}")
        return full
    path, at, share = first.rpartition("@")
    if not at or not re.fullmatch(r"\d*\.?\d+", share):
        raise ValueError(f"cache policy {spec!r} needs PATTERN@SPARSITY: {_KINDS}")
    return HeadSplit(
        full,
        SinkRing(*(ring or (64, 256)), positions="absolute", kv_dtype=kv_dtype),
        retrieval_heads(read_gates(Path(path)), float(share)),
    )


def without_end(policy: Policy, *, sinks: int = 4) -> Policy:
    """The policy with a ring, of the same size, in place of each full cache.

    Until the cache is full they are the same. From then on the ring forgets the oldest tokens, and
    its sinks keep their places in the cache, so that distances stay those of a full cache.

    Raises:
        ValueError: a full cache with no room for more than the sinks.
    """
    if isinstance(policy, PerLayer):
        return PerLayer(
            tuple(cast(LayerPolicy, without_end(own, sinks=sinks)) for own in policy.policies)
        )
    if isinstance(policy, HeadSplit | SplitHeads):
        retrieval = cast(LayerPolicy, without_end(policy.retrieval, sinks=sinks))
        return dataclasses.replace(policy, retrieval=retrieval)
    if not isinstance(policy, FullCache):
        return policy
    if policy.capacity <= sinks:
        raise ValueError(
            f"a full cache of {policy.capacity} tokens is too small to go on as a stream with "
            f"{sinks} sinks: give it more than {sinks}"
        )
    return SinkRing(sinks, policy.capacity - sinks, kv_dtype=policy.kv_dtype)
