"""The package as a whole: what it needs, what it costs to import, and the ops on a mesh."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_needs_nothing_but_jax():
    code = """
import sys
import jax, jax.numpy
before = set(sys.modules)
import pallas_kernels.sink_attention, pallas_kernels.ring_decode, pallas_kernels.block_sparse
import pallas_kernels.sharding, pallas_kernels.targets
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    assert set(run(code).split()) <= {"jax", "pallas_kernels", *sys.stdlib_module_names}


def test_the_readme_runs():
    text = (ROOT / "pallas_kernels" / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        assert block.count("\n") <= 12
        run(block)


def test_the_ops_on_a_mesh_are_the_ops():
    """Four CPU devices, two rows by two heads; each op against itself on one device."""
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.ring import Ring, empty_ring, stored
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sharding import sharded
from pallas_kernels.sink_attention import sink_attention

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
def normal(*shape): return jnp.asarray(rng.standard_normal(shape), jnp.float32)
q, k, v = normal(2, 9, 4, 8), normal(2, 9, 2, 8), normal(2, 9, 2, 8)
ring = stored(normal(2, 2, 12, 8), normal(2, 2, 12, 8), jnp.int8)
floats = Ring(normal(2, 2, 12, 8), normal(2, 2, 12, 8))
ticks = jnp.asarray([3, 20], jnp.int32)
blocks = jnp.asarray(rng.integers(-1, 3, (2, 4, 3, 2)), jnp.int32)
rule = dict(sinks=4, window=8)
calls = [
    (sink_attention, (q, k, v), dict(rule, ring=floats, ticks=ticks, q_sinks=-q, return_lse=True,
                                     alibi_slopes=normal(4), sink_logits=normal(4))),
    (sink_attention, (q, k, v), dict(rule, ring=ring, ticks=ticks)),
    (sink_attention, (q, k, v), dict(rule, segment_ids=jnp.zeros((2, 9), jnp.int32))),
    (ring_decode, (q[:, :1], k[:, :1], v[:, :1], ring, ticks), rule),
    (block_sparse_attention, (q, k, v, blocks), dict(block_sizes=(4, 4))),
]
for op, args, kwargs in calls:
    expected = op(*args, **kwargs)
    got = jax.jit(lambda *a, op=op, kwargs=kwargs: sharded(op, mesh, batch="data", heads="model")(
        *a, **kwargs))(*args)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-6)
try:
    sharded(ring_decode, mesh, heads="model")(q[:, :1, :3], k[:, :1, :1], v[:, :1, :1], ring, ticks,
                                              **rule)
except ValueError as error:
    print(error)
"""
    assert "3 and 1 query heads and KV heads do not divide over the 2 devices" in run(code)
