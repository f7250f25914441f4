import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.caches import FullCache, SinkRing
from sinkjax.checkpoints import open_checkpoint, orbax
from sinkjax.checkpoints.orbax import load_model, restore_tree, save_model, save_tree


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def tree():
    return {
        "list": [jnp.arange(12.0).reshape(3, 4), (jnp.ones(2, jnp.bfloat16), None)],
        "counter": jnp.uint32(2**32 - 1),
        "flags": jnp.array([True, False]),
        "numpy": np.arange(5, dtype=np.int32),
    }


def test_round_trip(tmp_path, tree):
    save_tree(tmp_path / "t", tree)
    same(restore_tree(tmp_path / "t", like(tree)), tree)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("policy", [FullCache(8), SinkRing(2, 6)])
def test_live_caches(tmp_path, hf_folder, policy):
    model = open_checkpoint(str(hf_folder())).model
    _, caches = model(jnp.arange(8).reshape(2, 4), model.init_caches(policy, batch=2))
    save_tree(tmp_path / "c", caches)
    same(restore_tree(tmp_path / "c", jax.eval_shape(lambda: caches)), caches)


def test_dtypes_are_cast(tmp_path):
    save_tree(tmp_path / "t", {"x": jnp.ones(3)})
    wanted = {"x": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    assert restore_tree(tmp_path / "t", wanted)["x"].dtype == jnp.bfloat16


def test_a_second_save_replaces_the_first(tmp_path):
    for value in range(3):
        save_tree(tmp_path / "t", {"x": jnp.full(3, value)})
    wanted = {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}
    np.testing.assert_array_equal(restore_tree(tmp_path / "t", wanted)["x"], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_killed_between_the_renames(tmp_path):
    one = {"x": jnp.ones(3)}
    save_tree(tmp_path / "t", one)
    os.rename(tmp_path / "t", tmp_path / "t.previous")
    same(restore_tree(tmp_path / "t", like(one)), one)
    two = {"x": jnp.full(3, 2.0)}
    save_tree(tmp_path / "t", two)
    same(restore_tree(tmp_path / "t", like(two)), two)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_leftovers_of_a_killed_save_do_no_harm(tmp_path, tree):
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "half").write_text("…")
    save_tree(tmp_path / "t", tree)
    same(restore_tree(tmp_path / "t", like(tree)), tree)
    assert not (tmp_path / "t.partial").exists()


DISK_FULL = """
import resource, signal, sys
import jax.numpy as jnp, jax
from sinkjax.checkpoints.orbax import restore_tree, save_tree
path = sys.argv[1]
save_tree(path, {"x": jnp.arange(10.0)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_tree(path, {"x": jax.random.normal(jax.random.key(0), (100_000,))})
except Exception as error:
    print("raised", type(error).__name__)
x = restore_tree(path, {"x": jax.ShapeDtypeStruct((10,), jnp.float32)})["x"]
print("kept", bool((x == jnp.arange(10.0)).all()))
"""


def test_a_save_that_fails_raises_and_leaves_the_earlier_one(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", DISK_FULL, str(tmp_path / "t")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "raised OSError" in result.stdout and "kept True" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


FOUR_DEVICES = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from sinkjax.checkpoints.orbax import restore_tree, save_tree
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, jax.P("x"))
x = restore_tree(sys.argv[1], {"x": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split)})["x"]
assert x.sharding.num_devices == 4
save_tree(sys.argv[2], {"x": x + 1})
"""


def test_other_device_counts(tmp_path):
    x = jnp.arange(24.0).reshape(8, 3)
    save_tree(tmp_path / "one", {"x": x})
    command = [sys.executable, "-W", "error", "-c", FOUR_DEVICES]
    command += [str(tmp_path / "one"), str(tmp_path / "four")]
    subprocess.run(command, check=True, timeout=120)
    same(restore_tree(tmp_path / "four", like({"x": x})), {"x": x + 1})


def test_all_differences_are_listed(tmp_path, tree):
    save_tree(tmp_path / "t", {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)})
    with pytest.raises(ValueError) as error:
        restore_tree(tmp_path / "t", like({"a": jnp.ones(2), "b": jnp.ones(9), "d": jnp.ones(1)}))
    for line in ("missing: d", "surplus: c", "misshapen: b is (3,), expected (9,)"):
        assert line in str(error.value)


def test_bad_trees(tmp_path):
    with pytest.raises(ValueError, match="empty arrays cannot be saved: y"):
        save_tree(tmp_path / "t", {"x": jnp.ones(2), "y": jnp.ones((0, 3))})
    with pytest.raises(ValueError, match="same path"):
        save_tree(tmp_path / "t", {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        restore_tree(tmp_path / "t", {})


@pytest.mark.parametrize("victim", ["manifest.ocdbt", "_METADATA", "d"])
def test_corrupt(tmp_path, tree, victim):
    save_tree(tmp_path / "t", tree)
    victim = tmp_path / "t" / victim
    if victim.is_dir():
        shutil.rmtree(victim)
        shutil.rmtree(victim.parent / "ocdbt.process_0" / "d")
    else:
        victim.write_bytes(b"xx")
    with pytest.raises(ValueError, match="/t is a corrupt or truncated checkpoint"):
        restore_tree(tmp_path / "t", like(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_model(tmp_path, hf_folder, tokenizer, logits, dtype):
    loaded = open_checkpoint(str(hf_folder(tie_word_embeddings=True, model_type="qwen3")))
    save_model(tmp_path / "m", loaded.config, loaded.model, tokenizer)
    config, model, again = load_model(tmp_path / "m", dtype)
    assert config == loaded.config
    assert again.encode("abc") == [0, 1, 2] and again.eos_ids == tokenizer.eos_ids
    assert model.embed[...].dtype == dtype
    if dtype == jnp.float32:
        np.testing.assert_array_equal(logits(model), logits(loaded.model))


def test_newer_format(tmp_path, hf_folder):
    loaded = open_checkpoint(str(hf_folder()))
    save_model(tmp_path / "m", loaded.config, loaded.model, None)
    manifest = tmp_path / "m" / orbax.MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2, expected 1"):
        open_checkpoint(str(tmp_path / "m"))
    manifest.write_text('{"format": 1, "config": {"family": "llama"}}')
    with pytest.raises(ValueError, match="holds no config"):
        open_checkpoint(str(tmp_path / "m"))
