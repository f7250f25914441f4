import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.checkpoints import open_checkpoint, orbax
from sinkjax.convert import convert
from sinkjax.models import Config


def command(*arguments):
    line = [sys.executable, "-W", "error", "-m", "sinkjax.convert", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_round_trip(tmp_path, hf_folder, tokenizer, logits):
    source = hf_folder()
    tokenizer.save(source)
    report = convert(str(source), tmp_path / "new" / "dst")
    before, after = open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "new" / "dst"))
    np.testing.assert_array_equal(logits(before.model), logits(after.model))
    assert after.config == before.config and after.name == "dst"
    assert after.tokenizer.encode("abc") == before.tokenizer.encode("abc")
    assert report.parameters > 10_000 and report.size > report.parameters


def test_the_command(tmp_path, hf_folder):
    result = command(hf_folder(), tmp_path / "dst", "--dtype", "bfloat16")
    assert result.returncode == 0 and result.stderr == ""
    assert "parameters" in result.stdout and result.stdout.count("\n") == 1
    model = open_checkpoint(str(tmp_path / "dst"), dtype="bfloat16").model
    assert model.embed[...].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["only-one"], "convert: expected SRC and DST, got 1 arguments"),
        (["nothing", "dst"], "convert: no model at 'nothing'"),
        (["a", "b", "--dtype", "int4"], "convert: flag --dtype=int4"),
        (["a", "b", "--nonsense"], "convert: Unknown command line flag 'nonsense'"),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    result = command(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_help():
    result = command("--help")
    assert "--dtype" in result.stdout and "SRC DST" in result.stdout


def test_an_existing_folder_is_not_touched(tmp_path, hf_folder):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("…")
    with pytest.raises(FileExistsError, match="remove it first"):
        convert(str(hf_folder()), tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == ["precious"]


def test_an_empty_folder_is_taken(tmp_path, hf_folder):
    (tmp_path / "dst").mkdir()
    convert(str(hf_folder()), tmp_path / "dst")
    open_checkpoint(str(tmp_path / "dst"))


def test_a_failure_leaves_nothing(tmp_path, hf_folder, tokenizer, monkeypatch):
    source = hf_folder()
    tokenizer.save(source)

    def fail(self, directory):
        assert (directory / "weights").is_dir()
        raise OSError("no space left")

    monkeypatch.setattr(type(tokenizer), "save", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(str(source), tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_killed_at_any_moment(tmp_path, hf_folder, monkeypatch):
    source = hf_folder()

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(orbax.shutil, "rmtree", lambda *_, **__: None)  # who is killed tidies nothing
        patch.setattr(Config, "to_json", kill)
        with pytest.raises(Killed):
            convert(str(source), tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and (tmp_path / "dst.partial").exists()
    convert(str(source), tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "tiny"]
    open_checkpoint(str(tmp_path / "dst"))
