"""The parts of a decoder: norm, attention, MLP. They hold parameters; memory is handed in."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from sinkjax.caches import Cache
from sinkjax.models.config import Config


def rms_norm(x: Float[Array, "... E"], weight: Float[Array, " E"], eps: float) -> Array:
    """x over its root mean square, in float32, back in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def matrix(rngs: nnx.Rngs | None, shape: tuple[int, int], dtype, *, fan_in: int) -> nnx.Param:
    """Random weights, or zeros where there is nothing to draw from."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def embedded(table: Float[Array, "V E"], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The rows of a table. A few rows are sliced one by one."""
    if tokens.size > 64:
        return table[tokens]
    rows = [jax.lax.dynamic_index_in_dim(table, t, keepdims=False) for t in tokens.reshape(-1)]
    return jnp.stack(rows).reshape(*tokens.shape, -1)


class Attention(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        E, D = config.hidden_size, config.head_dim
        width = sum(config.fused["qkv"].values())
        self.config = config
        self.qkv = matrix(rngs, (E, width), dtype, fan_in=E)
        self.out = matrix(rngs, (config.heads * D, E), dtype, fan_in=config.heads * D)
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros(width, dtype))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(E, dtype))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(D, dtype))
            self.k_norm = nnx.Param(jnp.ones(D, dtype))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        cache: Cache,
        lengths: Int32[Array, " B"] | None,
        backend: str | None,
    ) -> tuple[Float[Array, "B T E"], Cache]:
        c = self.config
        # XLA for TPU else folds the split into heads into the product, for which it copies the
        # matrix to another layout at every call.
        y = jax.lax.optimization_barrier(x @ self.qkv[...])
        if c.qkv_bias:
            y = y + self.qkv_bias[...]
        y = y.reshape(*x.shape[:2], -1, c.head_dim)
        q, k, v = jnp.split(y, [c.heads, c.heads + c.kv_heads], axis=2)
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps)
            k = rms_norm(k, self.k_norm[...], c.norm_eps)
        y, cache = cache.attend(q, k, v, c.rotary, lengths, backend)
        y = y.reshape(*x.shape[:2], -1) @ self.out[...]
        return (y + self.out_bias[...] if c.out_bias else y), cache


class MLP(nnx.Module):
    """The gated unit of Llama: down(silu(gate x) · up x)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        E, F = config.hidden_size, config.intermediate_size
        self.gate_up = matrix(rngs, (E, 2 * F), dtype, fan_in=E)
        self.down = matrix(rngs, (F, E), dtype, fan_in=F)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        gate, up = jnp.split(x @ self.gate_up[...], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ self.down[...]
