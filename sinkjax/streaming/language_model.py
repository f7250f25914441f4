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
from jaxtyping import Array, Float, Int

from sinkjax.caches import Policy, SinkRing
from sinkjax.models import Config, Decoder
from sinkjax.streaming.sampling import Sampling
from sinkjax.streaming.step import CHUNK, StreamState, decode, prefill, score
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
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        name: str = "model",
        *,
        attention_backend: str | None = None,
    ):
        self.config: Config = model.config
        self.name = name
        self._tokenizer = tokenizer
        self._attention_backend = attention_backend
        # A step of a small model takes less time than Flax needs to flatten a module, so the
        # compiled functions take the bare arrays, and put the module together when traced.
        self._graph, params = nnx.split(model)
        self._leaves, self._tree = jax.tree.flatten(params)
        self.prefill = self._compiled(prefill)
        self.decode = self._compiled(decode, static=("steps", "sampling", "stop_tokens"))
        self.score = self._compiled(score)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        attention_backend: str | None = None,
    ) -> "LanguageModel":
        """Loads a model.

        Args:
            source: `smollm2-135m-instruct` (fetched once), a GGUF file, a Hugging Face folder, a
                folder written by `python -m sinkjax.convert`, or a hub id `owner/name`.
            dtype: of weights, activations and cache: `float32` or `bfloat16`.
            attention_backend: see the class.

        Raises:
            ValueError: the source is unknown, damaged, or of an architecture that is not supported.
        """
        # Orbax and its like take seconds to import; who brings their own weights needs none of it.
        from sinkjax.checkpoints import open_checkpoint

        loaded = open_checkpoint(os.fspath(source), dtype=dtype)
        return cls(loaded.model, loaded.tokenizer, loaded.name, attention_backend=attention_backend)

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

    def _compiled(self, f: Callable, *, static: tuple[str, ...] = ()) -> "Compiled":
        # XLA names a program after its function.
        @functools.wraps(f)
        def g(leaves, *args, **kwargs):
            return f(self._merged(leaves), *args, **kwargs)

        return Compiled(jax.jit(g, donate_argnums=1, static_argnames=static), self._leaves)

    def init_state(
        self, policy: Policy, sampling: Sampling | None = None, *, seeds: Sequence[int] = (0,)
    ) -> StreamState:
        """The state of a fresh stream, one row a seed."""
        sampling = sampling or Sampling()
        return StreamState.init(self.model, policy, sampling, jnp.asarray(seeds, jnp.uint32))

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
        for leaf in self._leaves:
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.asarray(leaf[:2]).tobytes())
        return digest.hexdigest()

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
    caches = lm.model.init_caches(cache)
    out = []
    for start in range(0, len(ids) - 1, chunk):
        length = min(chunk, len(ids) - 1 - start)
        pair = np.zeros((2, 1, chunk), np.int32)
        pair[0, 0, :length] = ids[start : start + length]
        pair[1, 0, :length] = ids[start + 1 : start + 1 + length]
        caches, surprise = lm.score(caches, pair[0], pair[1], jnp.asarray([length], jnp.int32))
        out.append(np.asarray(surprise[0, :length]))
        if progress:
            progress(length)
    return np.concatenate(out)
