"""Matrices in int8: the model that they make is that of the same numbers as floats."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.caches import FullCache, SinkRing
from sinkjax.checkpoints import open_checkpoint, orbax
from sinkjax.models import Decoder
from sinkjax.streaming import LanguageModel, Sampling, Stream
from tests.conftest import python, tiny_decoder
from tests.models.conftest import DATA, logits_of, reference, run
from tests.processes import run_processes

# Of the largest logit: both models do the same products in float32, and scale them before or after.
CLOSE = 1e-5


def as_floats(model: Decoder, of: Decoder) -> Decoder:
    """A model of floats with the numbers of one in int8, each within half a step of what it is
    made of, and the largest of a channel 127 steps."""
    rounded, kept = {}, model.weights()
    for name, x in of.weights().items():
        x = np.asarray(x, np.float64)
        if f"{name}_scale" in kept:
            axis = -1 if name in ("embed", "head") else -2
            scale = np.abs(x).max(axis, keepdims=True) / 127
            stored = np.expand_dims(np.asarray(kept[f"{name}_scale"]), axis)
            np.testing.assert_allclose(stored, scale, rtol=1e-6)
            rounded[name] = np.asarray(kept[name], np.float64) * stored
            assert (np.abs(rounded[name] - x) < scale * (0.5 + 1e-4)).all()
        else:
            rounded[name] = x
    assert len(rounded) < len(kept)
    return Decoder.from_weights(model.config, rounded)


# A head of its own; tied embeddings with scaled rows; biases everywhere; experts without and with.
@pytest.mark.parametrize("name", ["llama3", "gemma2", "bloom", "mixtral", "gpt_oss"])
def test_logits_are_those_of_the_rounded_weights(name, quick_compiles):
    model = open_checkpoint(str(DATA / name)).model
    found = open_checkpoint(str(DATA / name), weight_dtype="int8").model
    tokens, _ = reference(name)
    expected = logits_of(as_floats(found, model), tokens)
    largest = np.abs(expected).max()
    assert np.abs(logits_of(found, tokens) - expected).max() < CLOSE * largest
    # One token alone, which products of few rows serve, and few experts.
    one = run(found, tokens[:1, :1], found.init_caches(FullCache(1)))[0]
    assert np.abs(np.asarray(one) - expected[:1, :1]).max() < CLOSE * largest
    assert np.abs(logits_of(model, tokens) - expected).max() > 1e-4 * largest  # 8 bits are seen


def in_int8(model: Decoder, dtype=jnp.float32) -> Decoder:
    return Decoder.from_weights(model.config, model.weights(), dtype, weight_dtype="int8")


def test_bytes_and_dtypes():
    small = tiny_decoder(97)
    model = in_int8(small, jnp.bfloat16)
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (small, model))
    matrices = {path for path, leaf in before.items() if leaf.ndim > 1}
    for path, leaf in before.items():
        kept = after.pop(path)
        assert kept.shape == leaf.shape
        assert kept.dtype == (jnp.int8 if path in matrices else jnp.float32)  # norms
    assert after.keys() == {(*path[:-1], f"{path[-1]}_scale") for path in matrices}
    assert {leaf.dtype for leaf in after.values()} == {jnp.dtype(jnp.float32)}
    assert after["embed_scale",].shape == (97,)
    assert after["blocks", 1, "attention", "qkv_scale"].shape == ((4 + 2 * 2) * 8,)

    tokens = jnp.zeros((1, 12), jnp.int32)
    hidden, caches = jax.eval_shape(lambda: model(tokens, model.init_caches(FullCache(12))))
    assert hidden.dtype == caches.layers[0].ring.k.dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, hidden).dtype == jnp.float32


def test_memory_is_a_quarter_and_no_copy_of_the_model_is_made():
    """Two layers, decoded in a loop, and a chunk: a CPU makes floats of one matrix at a time."""
    config = dataclasses.replace(
        tiny_decoder(512).config, hidden_size=256, intermediate_size=4096, layers=2
    )
    floats, model = (Decoder(config, rngs=nnx.Rngs(0), weight_dtype=w) for w in (None, "int8"))
    size = [sum(x.nbytes for x in jax.tree.leaves(m)) for m in (floats, model)]
    assert size[1] < 0.26 * size[0]
    lm = LanguageModel(model)
    state = lm.init_state(SinkRing(1, 15))
    step = lm.decode.lower(state, jnp.int32(9), steps=9, sampling=Sampling(), stop_tokens=())
    chunk = lm.prefill.lower(state, np.zeros((1, 16), np.int32), np.full(1, 16, np.int32))
    for lowered in (step, chunk):
        memory = lowered.compile().memory_analysis()
        largest = 4 * 256 * 8192  # bytes of gate_up as floats
        assert memory.temp_size_in_bytes < 1.25 * largest < 0.5 * size[0]
        assert memory.argument_size_in_bytes < 1.1 * size[1]


MESH = """
import json
jax.config.update("jax_disable_most_optimizations", True)
import jax.numpy as jnp
from sinkjax import LanguageModel, SinkRing
from tests.models.test_weights8 import drawn
from tests.conftest import tiny_decoder
from sinkjax.models import Decoder
small = tiny_decoder(97)
for spec in (None, "model=2", "model=4"):
    made = spec and mesh.make(spec)
    model = Decoder.from_weights(small.config, small.weights(), jnp.float32, made, "int8")
    lm = LanguageModel(model, mesh=made)
    print(">", json.dumps([drawn(lm), lm.fingerprint()]))
    shares = [x.addressable_shards[0].data.nbytes for x in lm._leaves]
    assert spec is None or sum(shares) < 0.75 * sum(x.nbytes for x in lm._leaves)
"""


def drawn(lm: LanguageModel) -> list[int]:
    """Tokens of a stream that has gone round its ring."""
    stream = Stream(lm, cache=SinkRing(2, 6), sampling=Sampling(), ignore_eos=True, chunk=8)
    stream.feed([[1, 2, 3, 4, 5]])
    tokens = [token for (output,) in stream.run(12) for token in output.tokens]
    assert (lm.prefill.traces, lm.decode.traces) == (1, 1)
    return tokens


def test_a_stream_is_the_same_on_every_mesh(quick_compiles):
    """Two KV heads on two devices, and on four, where both are there twice."""
    small = tiny_decoder(97)
    lm = LanguageModel(in_int8(small))
    assert lm.fingerprint() != LanguageModel(small).fingerprint()
    (ended,) = run_processes(MESH, processes=1, devices=4, timeout=240)
    assert ended.code == 0, ended.err
    alone, *spread = ended.out.splitlines()
    assert spread == [alone] * 2
    assert json.loads(alone[2:])[0] == drawn(lm)


def test_the_command_saves_and_resumes(tiny_folder, tmp_path):
    common = ("-m", "sinkjax.decode", "--max_tokens", 5, "--temperature", 0)
    begun = python(
        *(*common, "--model", tiny_folder, "--weight_dtype", "int8"),
        *("--prompt", "Once", "--save", tmp_path / "saved"),
    )
    assert begun.returncode == 0, begun.stderr
    resumed = python(*common, "--resume", tmp_path / "saved")
    assert resumed.returncode == 0, resumed.stderr
    wrong = python(*common, "--resume", tmp_path / "saved", "--weight_dtype", "int4")
    assert wrong.returncode == 2
    assert b"--weight_dtype=int4: value should be one of <int8>" in wrong.stderr


def test_bad_input(tmp_path):
    small = tiny_decoder(97)
    message = r"weight_dtype must be one of \(None, 'int8'\), got 'int4'"
    with pytest.raises(ValueError, match=message):
        LanguageModel.load("smollm2-135m-instruct", weight_dtype="int4")
    with pytest.raises(ValueError, match=message):
        Decoder(small.config, rngs=None, weight_dtype="int4")
    with pytest.raises(ValueError, match="a model with int8 weights is not saved"):
        orbax.save_model(tmp_path / "m", small.config, in_int8(small), None)
    assert not (tmp_path / "m").exists()

    weights = small.weights()
    for bad in (np.nan, np.inf, -np.inf):
        weights["blocks.0.attention.k"] = weights["blocks.0.attention.k"].at[1, 2].set(bad)
        with pytest.raises(ValueError, match="not finite: blocks.0.attention.k holds NaN or inf"):
            Decoder.from_weights(small.config, weights, weight_dtype="int8")
    weights["blocks.0.attention.k"] = np.zeros(4)
    with pytest.raises(ValueError, match=r"misshapen: blocks.0.attention.k is \(4,\)"):
        Decoder.from_weights(small.config, weights, weight_dtype="int8")
