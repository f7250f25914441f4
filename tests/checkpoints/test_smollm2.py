"""The built-in model against the logits that transformers gave for the same file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.caches import FullCache
from sinkjax.checkpoints import open_checkpoint, orbax

REFERENCE = Path(__file__).parents[1] / "data" / "smollm2_reference.npz"


@pytest.fixture(scope="module")
def loaded():
    return open_checkpoint("smollm2-135m-instruct")


def test_sizes(loaded):
    assert loaded.name == "smollm2-135m-instruct"
    assert sum(x.size for x in jax.tree.leaves(loaded.model)) == 134_515_008
    assert loaded.config.trained_context == 8192 and loaded.config.tied_embeddings
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size


def test_logits(loaded):
    reference = np.load(REFERENCE)
    tokens = jnp.asarray(reference["tokens"].astype(np.int32))[None]
    hidden, _ = loaded.model(tokens, loaded.model.init_caches(FullCache(tokens.shape[1])))
    logits = np.asarray(loaded.model.logits(hidden))[0]
    scale = np.abs(reference["last_logits"]).max()
    for found, name in (
        (logits[:, reference["entries"]], "logits"),
        (logits[-1], "last_logits"),
        (jax.nn.logsumexp(logits, axis=-1), "logsumexp"),
    ):
        np.testing.assert_allclose(found, reference[name], rtol=0, atol=1e-4 * scale)
    np.testing.assert_array_equal(logits.argmax(-1), reference["argmax"])


def test_converted(loaded, tmp_path):
    orbax.save_model(tmp_path / "m", loaded.config, loaded.model, loaded.tokenizer)
    again = open_checkpoint(str(tmp_path / "m"))
    for x, y in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(again.model), strict=True):
        np.testing.assert_array_equal(x, y)
    text = "Once upon a time, é 123 <|im_end|>"
    assert again.tokenizer.encode(text) == loaded.tokenizer.encode(text)
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


def test_it_knows_where_paris_is(loaded):
    tokens = jnp.array([loaded.tokenizer.encode("The capital of France is")])
    caches = loaded.model.init_caches(FullCache(16))
    hidden, _ = loaded.model(tokens, caches)
    best = int(loaded.model.logits(hidden)[0, -1].argmax())
    assert loaded.tokenizer.decode([best]) == " Paris"
