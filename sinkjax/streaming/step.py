"""The pure functions that a stream compiles: prefill of a chunk, decode of some steps, scoring."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.ring import Ring
from sinkjax.caches import LayerCaches, Policy
from sinkjax.caches.protocol import unless
from sinkjax.mesh import MODEL
from sinkjax.models import Decoder
from sinkjax.streaming.sampling import Sampling, sample

CHUNK = 128  # tokens that one prefill call takes: large enough for full speed on a CPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """All that a stream keeps on the device, of fixed shape. Donated at every call.

    Attributes:
        caches: what the model remembers: every token fed or drawn so far is in.
        hidden: `[B, E]`, the final hidden state of each row's newest token.
        recent: `[B, N]`, each row's newest tokens, the newest last; −1: none (see `Sampling`).
        seeds: `[B]`, of the random draws.
        done: `[B]`, true once a row has drawn a stop token.
    """

    caches: LayerCaches
    hidden: Float[Array, "B E"]
    recent: Int32[Array, "B N"]
    seeds: UInt32[Array, " B"]
    done: Array

    @classmethod
    def init(
        cls, model: Decoder, policy: Policy, sampling: Sampling, seeds: UInt32[Array, " B"]
    ) -> Self:
        batch = len(seeds)
        caches = model.init_caches(policy, batch=batch)
        return cls(
            caches,
            jnp.zeros((batch, model.config.hidden_size), model.dtype),
            jnp.full((batch, sampling.memory), -1, jnp.int32),
            seeds,
            jnp.zeros(batch, bool),
        )


def specs_of(state: StreamState | LayerCaches, rows: str | None) -> Any:
    """How a state lies on a mesh: KV heads over the mesh axis of heads.

    Args:
        rows: the mesh axis over which the rows of the batch are spread; None: none.
    """

    def spec(x):
        return jax.tree.map(lambda _: P(rows, MODEL), x) if isinstance(x, Ring) else P(rows)

    return jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, Ring))


def _remembered(recent: Array, tokens: Array, lengths: Array) -> Array:
    if not recent.shape[1]:
        return recent
    both = jnp.concatenate([recent, tokens], axis=1)
    return jnp.take_along_axis(both, lengths[:, None] + jnp.arange(recent.shape[1]), axis=1)


def prefill(
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
) -> StreamState:
    """Takes the first `lengths` of T tokens of each row in. A row of length 0 stays as it is."""
    hidden, caches = model(tokens, state.caches, lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    fed = lengths > 0
    return dataclasses.replace(
        state,
        caches=caches,
        hidden=jnp.where(fed[:, None], newest, state.hidden),
        recent=_remembered(state.recent, tokens, lengths),
        done=state.done & ~fed,
    )


def decode(
    model: Decoder,
    state: StreamState,
    limit: Int32[Array, ""],
    *,
    steps: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[StreamState, Int32[Array, "steps B"]]:
    """Draws up to min(steps, limit) tokens a row and feeds each back; ends early once every row
    has drawn a stop token (the stop token is fed as well).

    Returns:
        The state, and the tokens; −1 where none was drawn: after the end, and in rows that were
        done before. A row that is done stands still while others go on.
    """

    def goes_on(done: Array) -> Array:
        live = ~jnp.all(done)
        if model.rows_axis is None:
            return live
        return jax.lax.pmax(live.astype(jnp.int32), model.rows_axis) > 0  # on all devices alike

    def step(carry):
        i, _, state, drawn = carry
        with jax.named_scope("sample"):
            token = sample(
                model.logits(state.hidden),
                sampling,
                recent=state.recent,
                seeds=state.seeds,
                positions=state.caches.position,
            )
        drawn = drawn.at[i].set(jnp.where(state.done, -1, token))
        hidden, caches = model(token[:, None], state.caches)
        stopped = jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))

        recent = _remembered(state.recent, token[:, None], jnp.ones_like(token))
        state = dataclasses.replace(
            state,
            caches=caches.but_still(state.done, state.caches),
            hidden=unless(state.done, hidden[:, 0], state.hidden),
            recent=unless(state.done, recent, state.recent),
            done=state.done | stopped,
        )
        return i + 1, goes_on(state.done), state, drawn

    def unfinished(carry):
        i, live, *_ = carry
        return (i < jnp.minimum(steps, limit)) & live

    drawn = jnp.full((steps, state.done.shape[0]), -1, jnp.int32)
    start = (jnp.int32(0), goes_on(state.done), state, drawn)
    *_, state, drawn = jax.lax.while_loop(unfinished, step, start)
    return state, drawn


def score(
    model: Decoder,
    caches: LayerCaches,
    tokens: Int32[Array, "B T"],
    targets: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
) -> tuple[LayerCaches, Float[Array, "B T"]]:
    """Feeds a chunk, and says how surprising each target was after the token at its place."""
    hidden, caches = model(tokens, caches, lengths)
    logits = model.logits(hidden)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return caches, jax.nn.logsumexp(logits, axis=-1) - chosen
