"""What the compiler says of a model spread over TPU chips that are not here
(`scripts/scale_report.py`)."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from sinkjax.caches import SinkRing
from sinkjax.mesh import over, parse

SCRIPT = Path(__file__).parents[1] / "scripts" / "scale_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("scale_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_on_four_chips_talks_of_activations_alone_and_writes_in_place(report):
    """One layer of Llama-3-8B on v5e-4, 32 rows, rings of 4,096."""
    mesh = over(targets.devices("v5e-4"), parse("model=4"))
    lm = report.model_on(report.with_layers(report.PRESETS["llama-3-8b"], 1), mesh)
    state = report.state_on(lm, SinkRing(4, 4092), 32)
    account = report.account(report.decode(lm, state))
    # After the embedding, attention and the MLP, hidden states [32, 4096] are added up; the
    # logits [32, 128256] are gathered. Nothing else is said, so no weight and no cache.
    assert account.collectives == {
        ("all-reduce", "bf16", 32 * 4096): 3,
        ("all-gather", "f32", 32 * 128_256): 1,
    }
    # K and V of 32 rows, 8 / 4 heads, 4,096 slots of 128 bfloat16 numbers.
    rings = 2 * 32 * 2 * 4096 * 128 * 2
    assert rings <= account.aliased <= 1.01 * rings
    # A quarter of the layer, the head and the embedding; norms and clocks are small.
    weights = 2 * (4096 * (6144 + 4096 + 3 * 14_336) + 2 * 128_256 * 4096) // 4
    assert weights + rings <= account.arguments <= 1.001 * (weights + rings)
    assert account.temporary < rings / 4


def test_a_gathered_weight_is_found(report):
    mesh = over(targets.devices("v5e-4"), parse("model=4"))
    weight = report.on(mesh, jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), P("model"))
    whole = jax.sharding.NamedSharding(mesh, P())
    compiled = jax.jit(lambda w: w + 1, out_shardings=whole).lower(weight).compile()
    assert report.collectives(compiled) == {("all-gather", "bf16", 4096 * 1024): 1}
