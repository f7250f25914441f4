"""A command on several hosts: what is wrong on one is said on all, within seconds."""

import time

import pytest

from tests.processes import free_port, run_python

# A command of its own, so that no model is needed.
COMMAND = """
from absl import flags
from sinkjax import cli, mesh
flags.DEFINE_integer("window", 64, "")

def main(argv):
    print("window", flags.FLAGS.window, argv)
    if mesh.several() and not mesh.is_main() and argv == ["alone"]:
        raise ValueError("no such file here")
    if argv == ["alone"]:
        mesh.agree("what was read", 1)
    if argv == ["all"]:
        raise ValueError("heads do not divide")

cli.run(main)
"""


def commands(*own: list[str]) -> list[list[str]]:
    port = free_port()
    place = ["--coordinator_address", f"localhost:{port}", f"--num_processes={len(own)}"]
    return [["-c", COMMAND, *place, f"--process_id={i}", *args] for i, args in enumerate(own)]


def test_one_process_prints():
    first, second = run_python(commands(["--window=8", "x"], ["--window=8", "x"]))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out == "window 8 ['x']\n" and second.out == ""


@pytest.mark.parametrize(
    ("first", "second", "message", "code"),
    [
        (["--window=8"], [], "process 1 (", 2),
        (["x"], ["y"], "): y", 2),
        ([], ["--windw=8"], "reading the flags failed on process 1 (", 2),
        (["--window=z"], [], "reading the flags failed on process 0 (", 2),
        (["all"], ["all"], "heads do not divide", 2),
    ],
)
def test_what_is_wrong_is_said_by_all(first, second, message, code):
    start = time.monotonic()
    for ended in run_python(commands(first, second), timeout=30):
        assert ended.code == code and message in ended.err, ended
    assert time.monotonic() - start < 30


def test_an_error_of_one_process_alone_ends_the_other():
    first, second = run_python(commands(["alone"], ["alone"]), timeout=40)
    assert second.code == 2 and "no such file here" in second.err
    assert first.code != 0 and "process 1 (" in first.err
