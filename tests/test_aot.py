"""What the compiler says of whole steps on a TPU that is not here (`scripts/aot_report.py`)."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from sinkjax.caches import SinkRing
from sinkjax.models.families import PRESETS

SCRIPT = Path(__file__).parents[1] / "scripts" / "aot_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("aot_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4"])
def test_the_decode_step_moves_what_it_must(report, kv_dtype):
    """One layer of Llama-3-8B (all 32 do not fit one v5e), batch 8, ring of 4,096: bytes moved
    within 5% of weights and ring read once, the ring donated, and no temporary of its size."""
    config = dataclasses.replace(PRESETS["llama-3-8b"], layers=1)
    program = next(report.steps("llama-3-8b", config, [kv_dtype]))
    compiled = program.lower("v5e").compile(report.OPTIONS["tpu"])
    memory = compiled.memory_analysis()
    ring = report.cache_bytes(config, SinkRing(4, 4092, kv_dtype=kv_dtype), 8)
    assert compiled.cost_analysis()["bytes accessed"] <= 1.05 * program.fewest
    assert ring <= memory.alias_size_in_bytes <= 1.01 * ring
    assert memory.temp_size_in_bytes < ring / 8
