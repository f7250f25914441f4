"""The decoder. The shortest path from tokens to logits is this file."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sinkjax.caches import LayerCaches, PerLayer, Policy, SinkRing, by_layer
from sinkjax.caches.heads import SplitHeads
from sinkjax.mesh import MODEL
from sinkjax.models.config import Config
from sinkjax.models.layers import (
    MLP,
    Attention,
    Call,
    ExpertMLP,
    Norm,
    embedded,
    embedded_int8,
    keep_8_bits,
    random_param,
    scale_of,
    scaled,
)
from sinkjax.models.parameters import (
    Parameter,
    check_shards,
    check_weight_dtype,
    grouped,
    heads_in,
)


class Block(nnx.Module):
    def __init__(
        self, config: Config, layer: int, *, rngs: nnx.Rngs | None, dtype=jnp.float32, shards=1
    ):
        self.config = config
        self.attention_norm = Norm.of(config)
        self.attention = Attention(config, layer, rngs=rngs, dtype=dtype, shards=shards)
        if not config.shared_norm:
            self.mlp_norm = Norm.of(config)
        mlp = ExpertMLP if config.has_experts(layer) else MLP
        self.mlp = mlp(config, rngs=rngs, dtype=dtype)
        if config.post_norms:
            self.post_attention_norm = Norm.of(config)
            self.post_mlp_norm = Norm.of(config)

    def __call__(self, x, cache, call):
        c = self.config
        seen = self.attention_norm(x)
        y, cache = self.attention(seen, cache, call)
        if c.parallel:
            seen = seen if c.shared_norm else self.mlp_norm(x)
            return x + call.sum(y + self.mlp(seen, call)), cache
        y = call.sum(y)
        x = x + (self.post_attention_norm(y) if c.post_norms else y)
        y = call.sum(self.mlp(self.mlp_norm(x), call))
        return x + (self.post_mlp_norm(y) if c.post_norms else y), cache


class Decoder(nnx.Module):
    """A pre-norm decoder. Holds parameters and no state.

    Args:
        config: its sizes and switches.
        rngs: for random weights; None: zeros. `Decoder.from_weights` takes those of a checkpoint.
        dtype: of parameters and activations. Norms, softmax and logits are float32 regardless.
        weight_dtype: of the matrices, if not `dtype`: `"int8"`, with a scale for each output
            channel. Router, norms and biases stay as they are.
        shards: how many devices it is laid out for. With more than one, it is called inside a
            `jax.shard_map` over the mesh axis `model`, with each device's part of the parameters.

    Attributes:
        attention_backend: of the ops of `pallas_kernels`; None: the best that serves.
        rows_axis: the mesh axis over which the rows of a batch are spread; None: none.
        head_order: the order of the KV heads of each layer; None: as in the checkpoint.
        remat: a gradient keeps the inputs of each layer alone, and computes the rest anew.
    """

    attention_backend: str | None = None
    rows_axis: str | None = None
    head_order: tuple[tuple[int, ...], ...] | None = None
    remat: bool = False

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs | None,
        dtype=jnp.float32,
        shards=1,
        weight_dtype: str | None = None,
    ):
        check_weight_dtype(weight_dtype)
        self.config, self.shards = config, shards
        self.dtype, self.weight_dtype = jnp.dtype(dtype), weight_dtype
        V, E = config.vocab_size, config.hidden_size
        self.vocab_axis = "vocab" if V % shards == 0 else None  # else every device has all of it
        axes = (self.vocab_axis, None)
        self.embed = random_param(rngs, (V, E), dtype, axes, fan_in=1)
        if config.embedding_norm:
            self.embed_norm = Norm.of(config)
        self.blocks = nnx.List(
            [
                Block(config, layer, rngs=rngs, dtype=dtype, shards=shards)
                for layer in range(config.layers)
            ]
        )
        self.norm = Norm.of(config)
        if not config.tied_embeddings:
            self.head = random_param(rngs, (V, E), dtype, axes, fan_in=E)
        if config.head_bias:
            self.head_bias = nnx.Param(jnp.zeros(V, jnp.float32), axes=(self.vocab_axis,))
        if weight_dtype is not None:
            for block in self.blocks:
                keep_8_bits(block.attention)
                keep_8_bits(block.mlp)
            keep_8_bits(self)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        caches: LayerCaches,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T E"], LayerCaches]:
        """The final hidden states of T new tokens a row, and the caches with them in.

        Args:
            tokens: ids below `vocab_size`; the caller checks them.
            caches: from `init_caches`, or from the call before.
            lengths: how many of the T tokens of each row are real; None: all.
        """
        axis = MODEL if self.shards > 1 else None
        call = Call(lengths, self.attention_backend, axis, self.shards)
        x = self._embedded(tokens, call)
        new = []
        for block, cache in zip(self.blocks, caches, strict=True):
            layer = functools.partial(block, call=call)
            x, cache = (jax.checkpoint(layer) if self.remat else layer)(x, cache)
            new.append(cache)
        return self.norm(x), LayerCaches.of(new)

    def _embedded(self, tokens: Int[Array, "B T"], call: Call) -> Float[Array, "B T E"]:
        c, table = self.config, self.embed[...]
        if call.axis is None or self.vocab_axis is None:
            x = self._rows(tokens)
        else:  # each device has some rows
            here = tokens - jax.lax.axis_index(call.axis) * table.shape[0]
            mine = (here >= 0) & (here < table.shape[0])
            x = self._rows(jnp.where(mine, here, 0))
            x = call.sum(jnp.where(mine[..., None], x, jnp.zeros_like(x)))
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        return self.embed_norm(x) if c.embedding_norm else x

    def _rows(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        table, scale = self.embed[...], scale_of(self, "embed")
        if scale is None:
            return embedded(table, tokens)
        return (embedded_int8(table, tokens) * scale[tokens][..., None]).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """Scores of the next token, float32, from final hidden states."""
        name = "embed" if self.config.tied_embeddings else "head"
        head, scale = getattr(self, name)[...], scale_of(self, name)
        if scale is None:
            y = jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)
        else:
            y = scaled(hidden, head, scale, transposed=True)
        if self.config.head_bias:
            y = y + self.head_bias[...]
        if self.shards > 1 and self.vocab_axis is not None:
            y = jax.lax.all_gather(y, MODEL, axis=y.ndim - 1, tiled=True)
        cap = self.config.logit_soft_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def init_caches(self, policy: Policy, *, batch: int = 1) -> LayerCaches:
        """Empty caches for all layers, in the dtype of the parameters.

        Layers that were trained with a window, among others that were not, keep just that window,
        unless `policy` is a `PerLayer`.

        Raises:
            ValueError: the policy lets a token attend further back than the model's own window,
                is for a model of other sizes, or has heads of two kinds that do not lie alike on
                all devices.
        """
        c = self.config
        policies = list(by_layer(policy, c.layers, c.kv_heads))
        for layer, own in enumerate(policies):
            if isinstance(own, SplitHeads):
                policies[layer] = own = self._split(own, layer)
            window = c.window(layer)
            if window is None or own.reach <= window:
                continue
            if c.local_layers is None or isinstance(policy, PerLayer):
                raise ValueError(
                    f"{own} attends to {own.reach} tokens back, but layer {layer} of this model "
                    f"was trained with a sliding window of {window}: use SinkRing(sinks, window) "
                    f"with a window of at most {window}"
                )
            policies[layer] = SinkRing(0, window, kv_dtype=own.kv_dtype)
        return LayerCaches.init(
            PerLayer(tuple(policies)),
            layers=c.layers,
            batch=batch,
            kv_heads=max(c.kv_heads, self.shards),
            head_dim=c.head_dim,
            dtype=self.dtype,
        )

    def _split(self, policy: SplitHeads, layer: int) -> SplitHeads:
        """A policy for the heads of each device, in the order in which they lie."""
        heads = policy.heads
        if self.head_order is not None:
            heads = tuple(heads[head] for head in self.head_order[layer])
        local = heads[: max(1, len(heads) // self.shards)]
        if local * self.shards != heads:
            raise ValueError(
                f"the retrieval heads of layer {layer} do not lie alike on {self.shards} devices: "
                "load the model with heads=pattern"
            )
        return dataclasses.replace(policy, heads=local)

    def grouped(self, pattern: Bool[np.ndarray, "layers kv_heads"]) -> "Decoder":
        """The same model with the weights of each layer rearranged, in their place, so that the
        heads of each kind of a `HeadSplit` lie side by side (DuoAttention, section 2.3): then
        nothing is rearranged in a step. This one can't be used after that.

        Raises:
            ValueError: the pattern is for another model, or does not divide over the devices.
        """
        c = self.config
        if np.shape(pattern) != (c.layers, c.kv_heads):
            raise ValueError(
                f"the pattern is for {' layers of '.join(map(str, np.shape(pattern)))} KV heads, "
                f"this model has {c.layers} of {c.kv_heads}: use a pattern that was made for it"
            )
        order = [grouped(heads, self.shards) for heads in np.asarray(pattern)]
        graph, state = nnx.split(self)
        layout = dict(self.parameters())
        leaves = {}
        for path, leaf in nnx.to_flat_state(state):
            if "heads" in leaf.axes:
                layer = int(str(path[1]))
                leaf = leaf.replace(layout[path].reordered(leaf[...], order[layer], c))
            leaves[path] = leaf
        model = nnx.merge(graph, nnx.from_flat_state(leaves))
        model.head_order = tuple(tuple(map(int, heads)) for heads in order)
        for block, heads in zip(model.blocks, model.head_order, strict=True):
            block.attention.head_order = heads
        return model

    def parameters(self) -> list[tuple[tuple, Parameter]]:
        """The path and the layout of each parameter."""
        state = nnx.to_flat_state(nnx.state(self))
        return [(path, Parameter.of(self.config, self.shards, path, leaf)) for path, leaf in state]

    def weights(self) -> dict[str, Array]:
        """The weights by name, as `from_weights` takes them, heads as in the checkpoint."""
        leaves = (leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(self)))
        named: dict[str, Array] = {}
        for (path, parameter), leaf in zip(self.parameters(), leaves, strict=True):
            parts = parameter.parts_of(leaf)
            if "heads" in parameter.axes:
                parts = self.as_loaded(path, parts, parameter.axes.index("heads"))
            named |= parts
        return named

    def as_loaded(self, path: tuple, parts: Mapping[str, Array], axis: int) -> dict[str, Array]:
        """Parts of a parameter with their heads, along an axis, as they were in the checkpoint."""
        if self.head_order is None:
            return dict(parts)
        order = np.argsort(self.head_order[int(str(path[1]))])
        return {n: heads_in(order, n, x, self.config.kv_heads, axis) for n, x in parts.items()}

    @classmethod
    def shapes(cls, config: Config, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """What `from_weights` expects, by name."""
        return jax.eval_shape(lambda: cls(config, rngs=None, dtype=dtype).weights())

    @classmethod
    def from_weights(
        cls,
        config: Config,
        weights: Mapping[str, Any],
        dtype=jnp.float32,
        mesh: Mesh | None = None,
        weight_dtype: str | None = None,
    ) -> "Decoder":
        """A decoder with the weights of a checkpoint.

        Args:
            config: its sizes and switches.
            weights: by dotted name, such as `blocks.0.attention.q` `[E, H·D]` (the second axis
                of every matrix is its output, but for `embed` and `head`, `[V, E]`). They are
                asked for one by one, so that they may be read from a file only then.
            dtype: that the weights are cast to.
            mesh: the devices to spread them over; each share goes straight to its device.
            weight_dtype: see the class. Each matrix is quantised when it is read.

        Raises:
            ValueError: weights are missing, surplus, misshapen or not finite: all are listed; or
                the model does not divide over the mesh, or an unknown weight_dtype.
        """
        check_weight_dtype(weight_dtype)
        shards = 1 if mesh is None else mesh.shape[MODEL]
        check_shards(config, shards)
        abstract = nnx.eval_shape(
            lambda: cls(config, rngs=None, dtype=dtype, shards=shards, weight_dtype=weight_dtype)
        )
        layout = dict(abstract.parameters())
        scales = {path: (*path[:-1], f"{path[-1]}_scale") for path in layout}
        made = set(scales.values())
        wanted = {name for path in layout.keys() - made for name in layout[path].names}
        wrong = [f"missing: {name}" for name in wanted if name not in weights]
        wrong += [f"surplus: {name}" for name in weights if name not in wanted]
        graph, state = nnx.split(abstract)
        empty, leaves = dict(nnx.to_flat_state(state)), {}
        for path in layout:
            if path not in made and all(name in weights for name in layout[path].names):
                arrays, errors = layout[path].placed(weights, mesh, layout.get(scales[path]))
                wrong += errors
                for name, array in zip((path, scales[path]), arrays, strict=False):
                    leaves[name] = empty[name].replace(array)
        if wrong:
            listed = "\n  ".join(sorted(wrong))
            raise ValueError(f"these weights do not make a {config.family} decoder:\n  {listed}")
        return nnx.merge(graph, nnx.from_flat_state(leaves))
