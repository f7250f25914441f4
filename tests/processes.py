"""Runs a script as several processes of one program, as several hosts would."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

# Warnings are errors; what comes before the script is as on every host of a pod.
_START = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", {devices})
from sinkjax import mesh
if {processes} > 1:
    mesh.initialize("localhost:{port}", {processes}, {process})
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_python(commands: list[list[str]], *, timeout: float = 60) -> list[Ended]:
    """Runs these commands of the interpreter at the same time. All are killed after `timeout`
    seconds, which fails the test."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        # Files, not pipes: a process that fills a pipe would wait for its reader.
        files = [
            [open(Path(folder) / f"{i}.{n}", "w+") for n in "oe"] for i in range(len(commands))
        ]
        running = [
            subprocess.Popen(
                [sys.executable, "-W", "error", *map(str, command)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            for command, (out, err) in zip(commands, files, strict=True)
        ]
        late = False
        try:
            for process in running:
                process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
        texts = []
        for pair in files:
            for file in pair:
                file.seek(0)
            texts.append([file.read() for file in pair])
            for file in pair:
                file.close()
    said = "\n".join(f"--- process {i}\n{out}{err}" for i, (out, err) in enumerate(texts))
    assert not late, f"after {timeout} s some process still ran:\n{said}"
    return [Ended(p.returncode, *text) for p, text in zip(running, texts, strict=True)]


def run_processes(
    script: str, *args: object, processes: int = 2, devices: int = 1, timeout: float = 60
) -> list[Ended]:
    """Runs a script in several processes of one program.

    Args:
        script: Python source. `jax` and `sinkjax.mesh` are there, the processes know each other.
        args: of each, `sys.argv[1:]`.
        processes: how many.
        devices: of each.
        timeout: see `run_python`.
    """
    port = free_port()
    return run_python(
        [
            [
                "-c",
                _START.format(devices=devices, processes=processes, port=port, process=i) + script,
                *args,
            ]
            for i in range(processes)
        ],
        timeout=timeout,
    )


def reset_peak_memory() -> None:
    """Lets the peak of this process's resident memory start anew. Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The peak of this process's resident memory, in bytes. Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status says no peak")
