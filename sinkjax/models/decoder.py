"""The decoder of the Llama family. The shortest path from tokens to logits is this file."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sinkjax.caches import LayerCaches, Policy
from sinkjax.models.config import Config
from sinkjax.models.layers import MLP, Attention, embedded, matrix, rms_norm


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        self.eps = config.norm_eps
        self.attention_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x, cache, lengths, backend):
        y = rms_norm(x, self.attention_norm[...], self.eps)
        y, cache = self.attention(y, cache, lengths, backend)
        x = x + y
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), cache


class Decoder(nnx.Module):
    """A pre-norm decoder with rotary attention and gated MLPs. Holds parameters and no state.

    Args:
        config: its sizes.
        rngs: for random weights; None: zeros. `Decoder.from_weights` takes those of a checkpoint.
        dtype: of parameters and activations. Norms, softmax and logits are float32 regardless.

    Attributes:
        attention_backend: of the ops of `pallas_kernels`; None: the best that serves.
    """

    attention_backend: str | None = None

    def __init__(self, config: Config, *, rngs: nnx.Rngs | None, dtype=jnp.float32):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = matrix(rngs, shape, dtype, fan_in=1)
        self.blocks = nnx.List(
            [Block(config, rngs=rngs, dtype=dtype) for _ in range(config.layers)]
        )
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        if not config.tied_embeddings:
            self.head = matrix(rngs, shape, dtype, fan_in=config.hidden_size)

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
        x = embedded(self.embed[...], tokens)
        new = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache, lengths, self.attention_backend)
            new.append(cache)
        return rms_norm(x, self.norm[...], self.config.norm_eps), LayerCaches.of(new)

    def logits(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """Scores of the next token, float32, from final hidden states."""
        head = self.embed if self.config.tied_embeddings else self.head
        return jnp.einsum("...e,ve->...v", hidden, head[...], preferred_element_type=jnp.float32)

    def init_caches(self, policy: Policy, *, batch: int = 1) -> LayerCaches:
        """Empty caches for all layers, in the dtype of the parameters.

        Raises:
            ValueError: the policy lets a token attend further back than the model's own window.
        """
        c = self.config
        if c.sliding_window is not None and policy.reach > c.sliding_window:
            raise ValueError(
                f"{policy} attends to {policy.reach} tokens back, but this model was trained with "
                f"a sliding window of {c.sliding_window}: use SinkRing(sinks, window) with a "
                f"window of at most {c.sliding_window}"
            )
        return LayerCaches.init(
            policy,
            layers=c.layers,
            batch=batch,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            dtype=self.embed.dtype,
        )

    def weights(self) -> dict[str, Array]:
        """The weights by name, as `from_weights` takes them."""
        named = {}
        for path, leaf in nnx.to_flat_state(nnx.state(self)):
            *parents, last = map(str, path)
            parts = self.config.fused.get(last, {last: 0})
            splits = np.cumsum(list(parts.values()))[:-1]
            for part, array in zip(parts, jnp.split(leaf[...], splits, axis=-1), strict=True):
                named[".".join([*parents, part])] = array
        return named

    @classmethod
    def shapes(cls, config: Config, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """What `from_weights` expects, by name."""
        return jax.eval_shape(lambda: cls(config, rngs=None, dtype=dtype).weights())

    @classmethod
    def from_weights(
        cls, config: Config, weights: Mapping[str, Array], dtype=jnp.float32
    ) -> "Decoder":
        """A decoder with the weights of a checkpoint.

        Args:
            config: its sizes.
            weights: by dotted name, such as `blocks.0.attention.q` `[E, H·D]` (the second axis
                of every matrix is its output, but for `embed` and `head`, `[V, E]`). What the
                decoder keeps fused (`Config.fused`) is named by its parts.
            dtype: that the weights are cast to.

        Raises:
            ValueError: weights are missing, surplus, misshapen or not finite: all are listed.
        """
        wanted = cls.shapes(config, dtype)
        wrong = [f"missing: {name}" for name in wanted if name not in weights]
        wrong += [f"surplus: {name}" for name in weights if name not in wanted]
        for name in wanted.keys() & weights.keys():
            if weights[name].shape != wanted[name].shape:
                wrong.append(
                    f"misshapen: {name} is {weights[name].shape}, expected {wanted[name].shape}"
                )
            elif not np.isfinite(np.sum(np.asarray(weights[name], np.float32), dtype=np.float64)):
                wrong.append(f"not finite: {name} holds NaN or infinity")
        if wrong:
            listed = "\n  ".join(sorted(wrong))
            raise ValueError(f"these weights do not make a {config.family} decoder:\n  {listed}")
        graph, abstract = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=None, dtype=dtype)))
        leaves = {}
        for path, leaf in nnx.to_flat_state(abstract):
            *parents, last = map(str, path)
            parts = [weights[".".join([*parents, p])] for p in config.fused.get(last, [last])]
            whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
            leaves[path] = leaf.replace(jnp.asarray(whole, dtype))
        return nnx.merge(graph, nnx.from_flat_state(leaves))
