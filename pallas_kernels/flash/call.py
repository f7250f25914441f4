"""What a backend is handed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.flash.rule import Rule

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int32, Num

    from pallas_kernels.flash.pairs import Bound


class Call(NamedTuple):
    """The static part of a call. Hashable.

    Attributes:
        rule: which keys a query sees.
        block_q, block_k: queries and keys that a kernel takes at a time.
        most: key blocks that `Places.blocks` lists for any one query block, at most.
        out_dtype: of the output.
        interpret: parameters of Pallas' interpret mode; None: compiled.
        bound: block pairs that one of the lists in `Places.blocks` has at most; None: `most` for
            every query block.
        sinks_first: sinks are among the first S keys; else they may be anywhere.
        lists: Bb and Hb of `Places.blocks`; None: B and 1.
    """

    rule: Rule
    block_q: int
    block_k: int
    most: int
    out_dtype: DTypeLike
    interpret: Any = None
    bound: Bound | None = None
    sinks_first: bool = False
    lists: tuple[int, int] | None = None


class Inputs(NamedTuple):
    """What gradients flow to.

    Attributes:
        q: rotated queries; H is a multiple of Hkv, consecutive heads share a KV head (GQA).
        k, v: rotated keys, and values: floats, or int8 or int4 with scales. Whatever they are,
            they are multiplied in the dtype of `q`, made into it a block at a time.
        q_sinks: the queries rotated for the sinks; None: `q` serves all keys.
        k_scale, v_scale: float32, what the integers of each token and head are multiplied with;
            None: `k` and `v` are floats. With scales there are no gradients.
    """

    q: Float[Array, "B H T D"]
    k: Num[Array, "B Hkv K D"]
    v: Num[Array, "B Hkv K D"]
    q_sinks: Float[Array, "B H T D"] | None
    k_scale: Float[Array, "B Hkv K"] | None = None
    v_scale: Float[Array, "B Hkv K"] | None = None


class Places(NamedTuple):
    """Where queries and keys stand.

    Attributes:
        q_ticks, k_ticks: see `rule.py`; `EMPTY` where a slot holds no key.
        q_starts: the tick at which each query's sequence begins.
        slopes: ALiBi's, by head; None: no ALiBi.
        blocks: by query block (`block_q`) and key block (`block_k`; the last of either may be
            shorter), whether to look at all. Bh and Hb are 1 or B, and 1, Hkv or H.
    """

    q_ticks: Int32[Array, "B T"]
    k_ticks: Int32[Array, "B K"]
    q_starts: Int32[Array, "B T"]
    slopes: Float[Array, " H"] | None
    blocks: Bool[Array, "Bb Hb Nq Nk"]
