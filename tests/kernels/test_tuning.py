"""The table of block sizes: written by the script, read by the ops."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.flash import backends
from pallas_kernels.flash.call import Inputs

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)


def test_the_script_keeps_what_it_does_not_tune(tmp_path):
    (tmp_path / "flash.json").write_text('{"128-float32": [64, 64]}')
    done = run(
        f"--out={tmp_path}",
        *("--head_dims=16", "--blocks=16,32", "--tokens=64", "--slots=32", "--repeats=1"),
    )
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "flash.json").read_text())
    assert table["128-float32"] == [64, 64]
    assert set(table["16-float32"]) <= {16, 32}
    assert [path.name for path in tmp_path.iterdir()] == ["flash.json"]


def test_the_script_refuses_what_it_can_not_tune():
    assert "expected flash" in run("--ops=matmul").stderr


@pytest.mark.parametrize(("head_dim", "expected"), [(16, (32, 64)), (24, (256, 256))])
def test_the_ops_look_it_up(monkeypatch, tmp_path, head_dim, expected):
    (tmp_path / "flash.json").write_text('{"16-float32": [32, 64]}')
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    x = Inputs(jnp.zeros((1, 1, 8, head_dim)), None, None, None)
    assert backends.sizes("xla", x) == expected
    assert backends.sizes("tpu", x) != (32, 64)  # tuned on another platform
