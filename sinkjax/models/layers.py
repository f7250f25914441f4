"""The parts of a decoder: norm, attention, MLP, experts. They hold parameters; memory is handed in.

Each is written for one device. Where a model is spread over several, every device has a share of
the heads, of the width of the MLP and of the vocabulary, computes with these alone, and `Call.sum`
adds the shares up.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.ring import quantised
from sinkjax.caches import Cache, Scores
from sinkjax.models.config import Config
from sinkjax.models.parameters import SUMMED

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Call(NamedTuple):
    """What all layers share in one call of a model.

    Attributes:
        lengths: see `Cache.attend`.
        backend: of the attention ops.
        axis: the mesh axis over which the model is spread; None: it is all here.
        shards: the number of devices along it.
    """

    lengths: Int32[Array, " B"] | None
    backend: str | None
    axis: str | None
    shards: int

    def sum(self, share: Array) -> Array:
        """All devices' shares added up."""
        return share if self.axis is None else jax.lax.psum(share, self.axis)

    def once(self, x: Array) -> Array:
        """x as the share of one device, zeros as that of the others."""
        if self.axis is None:
            return x
        return jnp.where(jax.lax.axis_index(self.axis) == 0, x, jnp.zeros_like(x))


def random_param(
    rngs: nnx.Rngs | None,
    shape: tuple[int, ...],
    dtype,
    axes: tuple[str | None, ...],
    *,
    fan_in: int,
) -> nnx.Param:
    """Random weights, or zeros where there is nothing to draw from.

    Args:
        axes: a name for each axis (`sinkjax.mesh.RULES` says which are spread over devices).
    """
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5, axes=axes)


def keep_8_bits(module: nnx.Module) -> None:
    """Has the matrices of a module, not those of modules within it, in int8 with scales."""
    for name in SUMMED.keys() & vars(module).keys():
        param, axis = getattr(module, name), SUMMED[name]
        values, scale = quantised(jnp.moveaxis(param[...], axis, -1), jnp.int8)
        axes = list(param.axes)
        del axes[axis]
        setattr(module, name, nnx.Param(jnp.moveaxis(values, -1, axis), axes=param.axes))
        setattr(module, f"{name}_scale", nnx.Param(scale, axes=tuple(axes)))


def scale_of(module: nnx.Module, name: str) -> Array | None:
    """Of a matrix that is kept as int8."""
    scale = getattr(module, f"{name}_scale", None)
    return None if scale is None else scale[...]


def times(x: Float[Array, "... K"], module: nnx.Module, name: str) -> Float[Array, "... N"]:
    """A product with one of a module's matrices `[K, N]`."""
    matrix, scale = getattr(module, name)[...], scale_of(module, name)
    return x @ matrix if scale is None else scaled(x, matrix, scale).astype(x.dtype)


def scaled(
    x: Float[Array, "... K"],
    matrix: Int[Array, "..."],
    scale: Float[Array, " N"],
    *,
    transposed: bool = False,
) -> Float[Array, "... N"]:
    """A product with a matrix `[K, N]` of int8 (`[N, K]`: transposed), in float32.

    A TPU and a GPU read integers into the product; on a CPU, XLA makes floats of one matrix at a
    time.
    """
    rows = x.reshape(-1, x.shape[-1])
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    # A CPU else makes the floats of all matrices before the loop over steps.
    rows, matrix = jax.lax.optimization_barrier((rows, matrix))
    y = jax.lax.dot_general(rows, matrix.astype(x.dtype), dims, preferred_element_type=jnp.float32)
    return (y * scale).reshape(*x.shape[:-1], -1)


class Norm(nnx.Module):
    """Over the root mean square, or a LayerNorm; in float32, back in the dtype of the input.

    Weights are float32 whatever the dtype of the model: some are near 0 in a file and near 1 here.
    """

    def __init__(self, width: int, *, eps: float, kind: str = "rms", bias: bool = False):
        self.eps, self.kind = eps, kind
        self.weight = nnx.Param(jnp.ones(width, jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32), axes=(None,)) if bias else None

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.weight[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)

    @classmethod
    def of(cls, config: Config) -> "Norm":
        """A norm of hidden states."""
        return cls(config.hidden_size, eps=config.norm_eps, kind=config.norm, bias=config.norm_bias)


def embedded(table: Float[Array, "V E"], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The rows of a table. A few rows are sliced one by one."""
    if tokens.size > 64:
        return table[tokens]
    rows = [jax.lax.dynamic_index_in_dim(table, t, keepdims=False) for t in tokens.reshape(-1)]
    return jnp.stack(rows).reshape(*tokens.shape, -1)


def embedded_int8(table: Int[Array, "V E"], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The rows of a table of int8, float32.

    A tile of a TPU has 32 of them: to take one out, XLA copies the table to another layout.
    """
    size = min(32, table.shape[0])

    def row(token: Array) -> Float[Array, " E"]:
        start = token // size * size
        if table.shape[0] % size:
            start = jnp.minimum(start, table.shape[0] - size)
        tile = jax.lax.dynamic_slice_in_dim(table, start, size).astype(jnp.float32)
        return jnp.sum(jnp.where((start + jnp.arange(size) == token)[:, None], tile, 0), axis=0)

    flat = tokens.reshape(-1)
    rows = jnp.stack([row(t) for t in flat]) if flat.size <= 8 else jax.lax.map(row, flat)
    return rows.reshape(*tokens.shape, -1)


class Attention(nnx.Module):
    head_order: tuple[int, ...] | None = None  # of KV heads; None: as in the checkpoint

    def __init__(
        self, config: Config, layer: int, *, rngs: nnx.Rngs | None, dtype=jnp.float32, shards=1
    ):
        c, E, D = config, config.hidden_size, config.head_dim
        width = (c.heads + 2 * max(c.kv_heads, shards)) * D
        self.config, self.layer = config, layer
        self.qkv = random_param(rngs, (E, width), dtype, (None, "heads"), fan_in=E)
        self.out = random_param(rngs, (c.heads * D, E), dtype, ("heads", None), fan_in=c.heads * D)
        if c.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros(width, dtype), axes=("heads",))
        if c.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(E, dtype), axes=(None,))
        if c.qk_norm:
            self.q_norm = Norm(D, eps=c.norm_eps)
            self.k_norm = Norm(D, eps=c.norm_eps)
        if c.sink_logits:
            self.sink_logits = nnx.Param(jnp.zeros(c.heads, jnp.float32), axes=("heads",))

    def __call__(
        self, x: Float[Array, "B T E"], cache: Cache, call: Call
    ) -> tuple[Float[Array, "B T E"], Cache]:
        """Each device's share of the output, and the cache with its heads' new tokens in it."""
        c = self.config
        heads, kv_heads = c.heads // call.shards, max(1, c.kv_heads // call.shards)
        # XLA for TPU else folds the split into heads into the product, for which it copies the
        # matrix to another layout at every call.
        y = jax.lax.optimization_barrier(times(x, self, "qkv"))
        if c.qkv_bias:
            y = y + self.qkv_bias[...]
        if c.qkv_clip is not None:
            y = jnp.clip(y, -c.qkv_clip, c.qkv_clip)
        y = y.reshape(*x.shape[:2], -1, c.head_dim)
        q, k, v = jnp.split(y, [heads, heads + kv_heads], axis=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        slopes = None
        if c.alibi is not None:
            by_head = c.alibi.slopes(c.heads)
            if self.head_order is not None:
                by_head = by_head.reshape(c.kv_heads, -1)[list(self.head_order)].reshape(-1)
            slopes = jnp.asarray(by_head)
            if call.axis is not None:
                start = jax.lax.axis_index(call.axis) * heads
                slopes = jax.lax.dynamic_slice_in_dim(slopes, start, heads)
        scores = Scores(
            scale=c.attention_scale,
            soft_cap=c.attention_soft_cap,
            sink_logits=self.sink_logits[...] if c.sink_logits else None,
            alibi_slopes=slopes,
        )
        y, cache = cache.attend(
            q, k, v, c.rotary(self.layer), call.lengths, scores=scores, backend=call.backend
        )
        y = times(y.reshape(*x.shape[:2], -1), self, "out")
        return (y + call.once(self.out_bias[...]) if c.out_bias else y), cache


def unit(config: Config, gate: Array | None, up: Array) -> Array:
    """The inside of an MLP, between its products."""
    act = ACTIVATIONS[config.activation]
    if gate is None:
        return act(up)
    if config.swiglu_limit is None:
        return act(gate) * up
    gate = jnp.minimum(gate, config.swiglu_limit)
    up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


class MLP(nnx.Module):
    """down(act(gate x) · up x), or down(act(up x))."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        E, F = config.hidden_size, config.intermediate_size
        self.config = config
        width = 2 * F if config.gated else F
        first = random_param(rngs, (E, width), dtype, (None, "mlp"), fan_in=E)
        if config.gated:
            self.gate_up = first
        else:
            self.up = first
        self.down = random_param(rngs, (F, E), dtype, ("mlp", None), fan_in=F)
        if config.mlp_bias:
            bias = nnx.Param(jnp.zeros(width, dtype), axes=("mlp",))
            if config.gated:
                self.gate_up_bias = bias
            else:
                self.up_bias = bias
            self.down_bias = nnx.Param(jnp.zeros(E, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "B T E"], call: Call) -> Float[Array, "B T E"]:
        """Each device's share of the output."""
        c = self.config
        y = times(x, self, "gate_up" if c.gated else "up")
        if c.mlp_bias:
            y = y + (self.gate_up_bias if c.gated else self.up_bias)[...]
        gate, up = jnp.split(y, 2, axis=-1) if c.gated else (None, y)
        y = times(unit(c, gate, up), self, "down")
        return y + call.once(self.down_bias[...]) if c.mlp_bias else y


class ExpertMLP(nnx.Module):
    """A router, and the gated MLPs that it chooses from. Every device has a part of every expert's
    width."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        assert config.experts is not None
        self.config = config
        X, E, F = config.experts.count, config.hidden_size, config.experts.intermediate_size
        self.router = random_param(rngs, (E, X), dtype, (None, None), fan_in=E)
        self.gate_up = random_param(rngs, (X, E, 2 * F), dtype, (None, None, "mlp"), fan_in=E)
        self.down = random_param(rngs, (X, F, E), dtype, (None, "mlp", None), fan_in=F)
        if config.mlp_bias:
            self.router_bias = nnx.Param(jnp.zeros(X, dtype), axes=(None,))
            self.gate_up_bias = nnx.Param(jnp.zeros((X, 2 * F), dtype), axes=(None, "mlp"))
            self.down_bias = nnx.Param(jnp.zeros((X, E), dtype), axes=(None, None))

    def __call__(self, x: Float[Array, "B T E"], call: Call) -> Float[Array, "B T E"]:
        """Each device's share of the output."""
        assert self.config.experts is not None
        tokens = x.reshape(-1, x.shape[-1])
        scores = (tokens @ self.router[...]).astype(jnp.float32)
        if self.config.mlp_bias:
            scores = scores + self.router_bias[...].astype(jnp.float32)
        if not self.config.experts.normalise:
            scores = jax.nn.log_softmax(scores)
        best, which = jax.lax.top_k(scores, self.config.experts.chosen)
        shares = jax.nn.softmax(best) if self.config.experts.normalise else jnp.exp(best)
        # A few tokens read a few experts; many are sorted by expert, and all are read.
        through = self._few if which.size <= 8 else self._many
        y = through(tokens, which, call)
        y = jnp.sum(y * shares[..., None].astype(y.dtype), axis=1)
        return y.reshape(x.shape)

    def _few(self, tokens: Array, which: Int[Array, "N K"], call: Call) -> Float[Array, "N K E"]:
        def of(param: Array, expert: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(param, expert, keepdims=False)

        def product(x: Array, name: str, expert: Array) -> Array:
            matrix, scale = of(getattr(self, name)[...], expert), scale_of(self, name)
            if scale is None:
                return x @ matrix
            return scaled(x, matrix, of(scale, expert)).astype(x.dtype)

        out = []
        for n in range(which.shape[0]):
            for expert in which[n]:
                y = product(tokens[n], "gate_up", expert)
                if self.config.mlp_bias:
                    y = y + of(self.gate_up_bias[...], expert)
                y = product(unit(self.config, *jnp.split(y, 2, axis=-1)), "down", expert)
                if self.config.mlp_bias:
                    y = y + call.once(of(self.down_bias[...], expert))
                out.append(y)
        return jnp.stack(out).reshape(*which.shape, -1)

    def _many(self, tokens: Array, which: Int[Array, "N K"], call: Call) -> Float[Array, "N K E"]:
        order = jnp.argsort(which.reshape(-1), stable=True)
        expert = which.reshape(-1)[order]
        sizes = jnp.bincount(expert, length=self.gate_up.shape[0]).astype(jnp.int32)

        def product(x: Array, name: str) -> Array:
            matrix, scale = getattr(self, name)[...], scale_of(self, name)
            if scale is None:
                return jax.lax.ragged_dot(x, matrix, sizes)
            y = jax.lax.ragged_dot(x, matrix, sizes, preferred_element_type=jnp.float32)
            return (y * scale[expert]).astype(x.dtype)

        y = product(tokens[order // which.shape[1]], "gate_up")
        if self.config.mlp_bias:
            y = y + self.gate_up_bias[...][expert]
        y = product(unit(self.config, *jnp.split(y, 2, axis=-1)), "down")
        if self.config.mlp_bias:
            y = y + call.once(self.down_bias[...][expert])
        return y[jnp.argsort(order)].reshape(*which.shape, -1)
