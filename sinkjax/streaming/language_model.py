"""A model with its tokenizer, ready to stream and to be scored."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.ring import bytes_of
from sinkjax.caches import LayerCaches, Policy, SinkRing
from sinkjax.mesh import DATA, MODEL, fetch, spec_of
from sinkjax.models import Config, Decoder
from sinkjax.models.parameters import check_weight_dtype
from sinkjax.streaming.sampling import Sampling
from sinkjax.streaming.step import CHUNK, StreamState, decode, prefill, score, specs_of
from sinkjax.streaming.stream import Stream
from sinkjax.text.tokenizer import Tokenizer


class LanguageModel:
    """A decoder and its tokenizer.

    Args:
        model: the decoder; its weights stay where they are.
        tokenizer: None: only token ids can be streamed and scored.
        name: for messages.
        attention_backend: of the attention ops: `"reference"`, `"xla"`, `"tpu"` or `"gpu"`; None:
            the kernel of this platform where there is one.
        mesh: the devices that the model was put on (`Decoder.from_weights`); None: one.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        name: str = "model",
        *,
        attention_backend: str | None = None,
        mesh: Mesh | None = None,
    ):
        self.config: Config = model.config
        self.name, self.mesh = name, mesh
        self._tokenizer = tokenizer
        self._attention_backend = attention_backend
        # A step of a small model takes less time than Flax needs to flatten a module, so the
        # compiled functions take the bare arrays, and put the module together when traced.
        self._graph, params = nnx.split(model)
        self._leaves, self._tree = jax.tree.flatten(params)
        axes = jax.tree.map(lambda x: x.axes, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        self._specs = [spec_of(names) for names in jax.tree.leaves(axes, is_leaf=is_axes)]
        self.prefill = self.compiled(prefill, lambda state, rows: state)
        self.decode = self.compiled(
            decode,
            lambda state, rows: (state, P(None, rows)),
            static=("steps", "sampling", "stop_tokens"),
        )
        self.score = self.compiled(score, lambda caches, rows: (caches, P(rows)))

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        attention_backend: str | None = None,
        mesh: Mesh | None = None,
        heads: Bool[np.ndarray, "layers kv_heads"] | None = None,
        weight_dtype: str | None = None,
    ) -> "LanguageModel":
        """Loads a model.

        Args:
            source: `smollm2-135m-instruct` (fetched once), a GGUF file, a Hugging Face folder, a
                folder written by `python -m sinkjax.convert`, or a hub id `owner/name`.
            dtype: of weights, activations and cache: `float32` or `bfloat16`.
            attention_backend: see the class.
            mesh: the devices to spread the model and its streams over (`sinkjax.mesh.make`).
            heads: the pattern of the `HeadSplit` that will be used: weights are then rearranged so
                that a step need rearrange nothing, and each device has as many heads of each kind.
            weight_dtype: of the matrices, if not `dtype`: `int8`, with a scale for each output
                channel. They are quantised while they are read.

        Raises:
            ValueError: the source is unknown, damaged, or of an architecture that is not supported,
                or does not divide over the mesh; or an unknown weight_dtype.
        """
        # Orbax and its like take seconds to import; who brings their own weights needs none of it.
        from sinkjax.checkpoints import open_checkpoint

        check_weight_dtype(weight_dtype)  # before anything is fetched
        loaded = open_checkpoint(
            os.fspath(source), dtype=dtype, mesh=mesh, weight_dtype=weight_dtype
        )
        return cls(
            loaded.model if heads is None else loaded.model.grouped(heads),
            loaded.tokenizer,
            loaded.name,
            attention_backend=attention_backend,
            mesh=mesh,
        )

    @property
    def model(self) -> Decoder:
        return self._merged(self._leaves)

    def _merged(self, leaves: list[Array]) -> Decoder:
        model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))
        model.attention_backend = self._attention_backend
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: give token ids instead of text")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text or a turn."""
        return self._tokenizer.eos_ids if self._tokenizer else ()

    def compiled(
        self, f: Callable, specs: Callable[[Any, str | None], Any], *, static: tuple[str, ...] = ()
    ) -> "Compiled":
        """Compiles a function of the model.

        Args:
            f: takes the `Decoder`, a `StreamState` or `LayerCaches`, which are donated, and arrays
                whose first axis is that of the rows. On a mesh, every device has its part of each.
            specs: how the results lie on a mesh, from how the state does and the mesh axis of the
                rows.
            static: arguments that are no arrays, given by name.
        """

        # XLA names a program after its function.
        @functools.wraps(f)
        def g(leaves, state, *args, **kwargs):
            position = (state.caches if isinstance(state, StreamState) else state).position
            rows = self._rows_axis(position.shape[0])

            def of_rows(model, *args):
                model.rows_axis = rows
                return f(model, *args, **kwargs)

            held = specs_of(state, rows)
            given = [P(rows) if np.ndim(x) else P() for x in args]
            spread = self._spread(of_rows, (held, *given), specs(held, rows))
            return spread(leaves, state, *args)

        return Compiled(jax.jit(g, donate_argnums=1, static_argnames=static), self._leaves)

    def mapped(self, f: Callable, in_specs: tuple[P, ...], out_specs: Any) -> "Compiled":
        """Compiles a function of the model and of arrays that are no state.

        Args:
            f: takes the `Decoder` and the arrays; on a mesh, every device its part of each.
            in_specs, out_specs: how arrays and results lie on a mesh.
        """
        return Compiled(jax.jit(self._spread(f, in_specs, out_specs)), self._leaves)

    def _spread(self, f: Callable, in_specs: tuple[Any, ...], out_specs: Any) -> Callable:
        """A function of the model as one of its leaves, which every device runs on its part."""

        @functools.wraps(f)
        def local(leaves, *args):
            return f(self._merged(leaves), *args)

        if self.mesh is None:
            return local
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self._specs, *in_specs),
            out_specs=out_specs,
            check_vma=False,
        )

    def _rows_axis(self, rows: int) -> str | None:
        """The mesh axis over which rows are spread; None: every device has them all."""
        groups = 1 if self.mesh is None else self.mesh.shape[DATA]
        return DATA if groups > 1 and rows % groups == 0 else None

    def init_state(
        self, policy: Policy, sampling: Sampling | None = None, *, seeds: Sequence[int] = (0,)
    ) -> StreamState:
        """The state of a fresh stream, one row a seed.

        Raises:
            ValueError: the rows do not divide over the mesh, or see `Decoder.init_caches`.
        """
        if self.mesh is not None and len(seeds) % self.mesh.shape[DATA]:
            raise ValueError(
                f"{len(seeds)} rows do not divide over {self.mesh.shape[DATA]} devices of the mesh "
                f"axis {DATA!r}: give a multiple of that many prompts, or spread the model alone, "
                f"with {MODEL}={self.mesh.devices.size}"
            )
        sampling, numbers = sampling or Sampling(), jnp.asarray(seeds, jnp.uint32)
        return self._placed(
            lambda: StreamState.init(self.model, policy, sampling, numbers),
            self._rows_axis(len(seeds)),
        )

    def init_caches(self, policy: Policy) -> LayerCaches:
        """Empty caches for one row, as `score` takes them."""
        return self._placed(lambda: self.model.init_caches(policy), self._rows_axis(1))

    def cache_bytes(self, policy: Policy) -> int:
        """What the caches of one row hold, all devices together; int4 as half a byte (a CPU gives
        it a whole one)."""
        return bytes_of(jax.eval_shape(lambda: self.model.init_caches(policy)))

    def _placed(self, init: Callable, rows: str | None) -> Any:
        if self.mesh is None:
            return init()
        shapes = jax.eval_shape(init)
        where = jax.tree.map(
            # jax leaves an empty result unspread.
            lambda x, spec: self._sharding(spec if x.size else P()),
            shapes,
            specs_of(shapes, rows),
        )
        return jax.jit(init, out_shardings=where)()

    def put_rows(self, x: np.ndarray) -> Array:
        """An array `[B, ...]`, a part of a state, on the devices of its rows."""
        if self.mesh is None:
            return jnp.asarray(x)
        return jax.device_put(x, self._sharding(P(self._rows_axis(len(x)))))

    def _sharding(self, spec: P) -> NamedSharding:
        """As jax writes that of a result, without axes of size 1: what is put on devices here and
        what a step returns are else compiled for apart."""
        assert self.mesh is not None
        axes = [axis if axis and self.mesh.shape[axis] > 1 else None for axis in spec]
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(self.mesh, P(*axes))

    def check_tokens(self, tokens: Sequence[int] | np.ndarray | Array) -> np.ndarray:
        """The ids as int32. Raises ValueError where one is no id of this model's vocabulary."""
        ids = np.asarray(tokens)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be whole numbers, got an array of {ids.dtype}")
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"token {wrong.flat[0]} is out of range: {self.name} has the ids 0 to "
                f"{self.config.vocab_size - 1}"
            )
        return ids.astype(np.int32)

    def fingerprint(self) -> str:
        """Tells this model from others: a hash of its configuration and of parts of its weights."""
        # What a config does not say by itself is left out: later versions may have more fields.
        said = {
            field.name: value
            for field in dataclasses.fields(self.config)
            if (value := getattr(self.config, field.name)) != field.default
        }
        digest = hashlib.sha256(repr(sorted(said.items())).encode())
        named: dict[str, Array] = {}
        rows = self._first_rows()
        for (path, parameter), found in zip(self.model.parameters(), rows, strict=True):
            parts = parameter.parts_of(jnp.asarray(found))
            if parameter.axes[-1] == "heads":
                parts = self.model.as_loaded(path, parts, -1)
            named |= parts
        for name in sorted(named):
            digest.update(f"{name}{named[name].dtype}".encode())
            digest.update(np.asarray(named[name]).tobytes())
        return digest.hexdigest()

    def _first_rows(self) -> list[np.ndarray]:
        """Two rows of each parameter, all of vectors; of heads, those of the checkpoint's first."""
        starts = []
        for path, parameter in self.model.parameters():
            start = 0
            if self.model.head_order and parameter.axes[-2:-1] == ("heads",):
                width = parameter.shape[-2] // self.config.kv_heads
                start = width * self.model.head_order[int(str(path[1]))].index(0)
            starts.append(start)

        def rows(leaves):
            pairs = zip(leaves, starts, strict=True)
            return [x if x.ndim < 2 else x[(0,) * (x.ndim - 2)][at : at + 2] for x, at in pairs]

        if self.mesh is None:
            found = rows(self._leaves)
        else:
            found = jax.jit(rows, out_shardings=NamedSharding(self.mesh, P()))(self._leaves)
        return [np.asarray(x) for x in found]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        cache: Policy | None = None,
        max_tokens: int = 0,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        steps_per_call: int = 1,
    ) -> Iterator[str]:
        """Continues a prompt, piece by piece of printable text.

        Args:
            prompt: text, or token ids.
            cache: what to remember; None: `SinkRing(sinks=4, window=1020)`.
            max_tokens: at most so many; 0: for ever, or until the model ends the text.
            sampling: None: the likeliest token each time.
            seed: of the random draws.
            stop: strings before which the text ends.
            steps_per_call: tokens per call of the compiled step (see `Stream`).

        Raises:
            ValueError: an empty prompt, or a value out of range.
            CacheFull: a `FullCache` has no place left.
        """
        stream = Stream(
            self,
            cache=cache or SinkRing(sinks=4, window=1020),
            sampling=sampling or Sampling(),
            seeds=(seed,),
            stop=tuple(stop),
            steps_per_call=steps_per_call,
        )
        stream.feed([prompt])
        return (piece for (piece,) in stream.pieces(max_tokens) if piece)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A jitted function of a model, its weights bound."""

    jitted: Any  # jax names no type for it
    leaves: list[Array]

    def __call__(self, *args, **kwargs):
        return self.jitted(self.leaves, *args, **kwargs)

    @property
    def traces(self) -> int:
        """How often it was compiled."""
        return self.jitted._cache_size()

    def lower(self, *args, **kwargs):
        """As `jax.jit(...).lower`, for the compiler's own account of memory and bytes."""
        return self.jitted.lower(self.leaves, *args, **kwargs)


def nll(
    lm: LanguageModel,
    token_ids: Sequence[int] | Int[np.ndarray, " N"] | Int[Array, " N"],
    *,
    cache: Policy,
    chunk: int = CHUNK,
    progress: Callable[[int], object] | None = None,
) -> Float[np.ndarray, " N-1"]:
    """Negative log-likelihood of each token but the first, given those before it.

    Computed in chunks, and equal to feeding one token at a time: each query sees what the policy
    would have kept for it.

    Args:
        lm: the model.
        token_ids: `[N]`, N ≥ 2.
        cache: what the model remembers while it reads.
        chunk: tokens per call; changes speed and memory alone.
        progress: called with the number of tokens scored, after each chunk.

    Returns:
        `[N-1]`, float32, in nats.

    Raises:
        ValueError: fewer than two tokens, an id out of range, or chunk < 1.
        CacheFull: the text is longer than a `FullCache`.
    """
    ids = lm.check_tokens(token_ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"nll needs the ids of at least two tokens [N], got shape {ids.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be ≥ 1, got {chunk}")
    cache.check(len(ids) - 1)
    caches = lm.init_caches(cache)
    out = []
    for start in range(0, len(ids) - 1, chunk):
        length = min(chunk, len(ids) - 1 - start)
        pair = np.zeros((2, 1, chunk), np.int32)
        pair[0, 0, :length] = ids[start : start + length]
        pair[1, 0, :length] = ids[start + 1 : start + 1 + length]
        caches, surprise = lm.score(caches, pair[0], pair[1], np.asarray([length], np.int32))
        out.append(fetch(surprise)[0, :length])
        if progress:
            progress(length)
    return np.concatenate(out)
