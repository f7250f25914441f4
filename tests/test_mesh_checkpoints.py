"""Trees of arrays that are spread over processes, saved and restored on other meshes."""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sinkjax.checkpoints.orbax import Tensors, restore_tree, save_tree
from tests.processes import run_processes

# The tree, as all must see it.
TREE = """
import jax.numpy as jnp
import numpy as np
from sinkjax.checkpoints.orbax import restore_tree, save_tree

def tree():
    random = np.random.default_rng(0)
    return {
        "split": random.normal(size=(8, 12)).astype(np.float32),
        "half": random.normal(size=(4, 4)).astype(jnp.bfloat16),
        "all": np.arange(5, dtype=np.int32),
        "numpy": np.arange(3),
    }

SPECS = {"split": ("data", "model"), "half": (None, "model"), "all": ()}
"""

SAVE = (
    TREE
    + """
made = mesh.make("model=2,data=2")
spread = tree()
for name, spec in SPECS.items():
    x = spread[name]
    where = jax.NamedSharding(made, jax.P(*spec))
    spread[name] = jax.make_array_from_callback(x.shape, where, lambda index, x=x: x[index])
spread["own"] = jnp.ones(3)  # of each process, the same in both
for _ in range(2):  # the second replaces the first
    save_tree(sys.argv[1], spread)
mesh.agree("the end", 0)
"""
)

RESTORE = (
    TREE
    + """
made = mesh.make("model=4")
specs = {"split": (None, "model"), "half": ("model",), "all": ()}
wanted = {
    name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.NamedSharding(made, jax.P(*specs[name]))
    )
    for name, x in tree().items()
    if name in specs
}
wanted["numpy"] = jax.ShapeDtypeStruct((3,), int)
got = restore_tree(sys.argv[1], wanted)
assert got["split"].addressable_data(0).shape == (8, 3)
for name, x in tree().items():
    assert (mesh.fetch(got[name]) == x).all(), name
for path, tree in ((sys.argv[1], {"split": wanted["split"]}), (sys.argv[1] + "-", wanted)):
    try:
        restore_tree(path, tree)
    except ValueError as error:
        print(">", error)
print(">", "the end")
"""
)


def tree():
    names: dict = {}
    exec(TREE, names)
    return names["tree"]()


def test_saved_by_two_processes_restored_by_one(tmp_path):
    path = tmp_path / "t"
    for ended in run_processes(SAVE, path, devices=2):
        assert ended.code == 0, ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    expected = tree() | {"own": np.ones(3, np.float32)}
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in expected.items()}
    restored, lazy = restore_tree(path, like), Tensors(path)
    assert lazy.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(restored[name], x)
        np.testing.assert_array_equal(lazy[name], x)
        assert lazy.shapes[name] == x.shape and lazy[name].dtype == x.dtype


def test_saved_by_one_process_restored_by_two(tmp_path):
    path = tmp_path / "t"
    save_tree(path, jax.tree.map(jnp.asarray, tree()))
    ended = run_processes(RESTORE, path, devices=2)
    for one in ended:
        assert one.code == 0, one.err
        said = one.out[one.out.index(">") :]
        assert "failed on every process" in said
        assert "surplus: all\n  surplus: half\n  surplus: numpy" in said
        assert "there is no such folder" in said and said.endswith("> the end\n")


MISSING = """
from pathlib import Path
from sinkjax.checkpoints.safetensors import Tensors
shards = [Path(sys.argv[1])] if mesh.is_main() else [Path(sys.argv[1] + "-")]
try:
    with mesh.together("opening the checkpoint"):
        Tensors(shards)
except ValueError as error:
    print(error)
"""


def test_a_shard_that_one_host_lacks(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "shard")
    first, second = run_processes(MISSING, tmp_path / "shard", timeout=30)
    assert "opening the checkpoint failed on process 1" in first.out, first.err
    assert "No such file" in first.out and "shard-" in first.out
    assert first.out == second.out
