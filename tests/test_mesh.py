import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sinkjax import mesh
from tests.processes import run_processes, run_python


@pytest.mark.parametrize(
    ("spec", "data", "model"),
    [
        ("model=4,data=2", 2, 4),
        ("data=2,model=4", 2, 4),
        ("model=8", 1, 8),
        (" data = 3 ", 3, 1),
        ("model=1", 1, 1),
    ],
)
def test_parse(spec, data, model):
    assert mesh.parse(spec) == {"data": data, "model": model}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("heads=4", "has no axis 'heads': expected sizes of data and model"),
        ("", "has no axis ''"),
        ("model=2,model=2", "names the axis twice: 'model'"),
        ("model=two", "has the size 'two' for model: expected a whole number ≥ 1"),
        ("model=0", "has the size '0' for model"),
        ("model=-1", "has the size '-1' for model"),
        ("model", "has the size '' for model"),
        ("model=²", "has the size '²' for model"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError) as error:
        mesh.parse(spec)
    assert message in str(error.value)


def test_one_device():
    made = mesh.make("model=1")
    assert made.axis_names == ("data", "model") and made.devices.shape == (1, 1)
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"needs 4 devices, and there are 1 \(cpu\)"):
        mesh.make("model=4")


def test_spec_of():
    assert mesh.spec_of((None, "heads")) == P(None, "model")
    assert mesh.spec_of(("vocab", None)) == P("model", None)
    assert mesh.spec_of(("batch", "heads", None, None)) == P("data", "model", None, None)
    assert mesh.spec_of(("hidden",)) == P(None)
    assert mesh.spec_of(()) == P()


def test_one_process():
    mesh.initialize()  # finds nothing to join
    assert not jax.distributed.is_initialized()
    assert mesh.is_main() and not mesh.several()
    mesh.agree("anything", object())
    assert mesh.anywhere(True) is True and mesh.anywhere(False) is False
    with pytest.raises(KeyError), mesh.together("a step"):  # as it is
        raise KeyError("x")
    x = mesh.fetch(jnp.arange(3))
    assert isinstance(x, np.ndarray) and x.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost", 2, 0), "coordinator_address must be host:port, got 'localhost'"),
        (("localhost:1", None, None), "Give coordinator_address, num_processes and process_id"),
        ((None, 2, 0), "Give coordinator_address, num_processes and process_id"),
        (("localhost:1", 2, 2), "process_id < num_processes"),
    ],
)
def test_bad_addresses(given, message, monkeypatch):
    # In this process jax has its devices already, of which it would complain first.
    monkeypatch.setattr(jax._src.distributed.xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(ValueError) as error:
        mesh.initialize(*given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),  # an interactive session
        ({"SLURM_NTASKS": "4"}, True),
    ],
)
def test_slurm(monkeypatch, env, several):
    if env:
        env = env | {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1,n2", "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        }  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    mesh.initialize()
    assert joined == ([(None, None, None)] if several else [])


def test_tpu_pod(monkeypatch):
    from jax._src import clusters
    from jax._src.clusters import cloud_tpu_cluster

    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.GceTpuCluster, "is_env_present", lambda: False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")  # else asked of a metadata server
    mesh.initialize()
    assert joined == []  # a command that uses the CPU of one worker
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        mesh.initialize()
    finally:
        jax.config.update("jax_platforms", before)
    assert joined == [(None, None, None)]


EIGHT = """
import jax
from sinkjax import mesh
jax.config.update("jax_num_cpu_devices", 8)
for spec in ("model=4,data=2", "model=2"):
    made = mesh.make(spec)
    print(made.shape, [d.id for d in made.devices.flat])
x = jax.device_put(jax.numpy.arange(8.0), jax.NamedSharding(mesh.make("model=8"), jax.P("model")))
print(mesh.fetch(x).tolist())
try:
    mesh.make("model=4,data=4")
except ValueError as error:
    print(error)
"""


def test_eight_devices():
    (ended,) = run_python([["-c", EIGHT]])
    assert ended.out.splitlines() == [
        "OrderedDict({'data': 2, 'model': 4}) [0, 1, 2, 3, 4, 5, 6, 7]",
        "OrderedDict({'data': 1, 'model': 2}) [0, 1]",  # neighbours
        "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]",
        "mesh 'model=4,data=4' needs 16 devices, and there are 8 (cpu): "
        "choose sizes whose product is at most 8",
    ], ended.err


TOGETHER = """
me = int(mesh.is_main())
def said(f, *args):
    try:
        print(">", f(*args))
    except Exception as error:
        print(">", type(error).__name__, error)

def run(what, failure=None):
    with mesh.together(what):
        if failure is not None:
            raise failure
    return "went well"

mesh.agree("the flags", "--a=1\\n--b=2")
said(mesh.agree, "the flags", f"--a=1\\n--b={me}\\n--c=" + "x" * 500 + str(me))
said(run, "first")
said(run, "opening", None if me else FileNotFoundError("no shard 2"))
said(run, "opening", ValueError("both"))
said(run, "opening", KeyError("own") if me else ValueError("other"))
def nested():
    with mesh.together("outer"):
        run("inner", None if me else ValueError("deep"))
said(nested)
said(mesh.anywhere, bool(me))
said(mesh.anywhere, False)

x = jax.numpy.arange(8.0).reshape(4, 2)
made = mesh.make("model=2,data=2")
for spec in (jax.P("data"), jax.P("model", "data"), jax.P()):
    spread = jax.make_array_from_callback(
        x.shape, jax.NamedSharding(made, spec), lambda index: x[index]
    )
    said(lambda: (mesh.fetch(spread) == x).all())
said(lambda: mesh.fetch(x).shape)
said(mesh.make, "model=2")
said(mesh.agree, "the model" if me else "the tokenizer", 1)
"""


def test_two_processes():
    """All that must go wrong alike, and what goes well after it."""
    first, second = run_processes(TOGETHER, devices=2)
    lines = [[line for line in e.out.splitlines() if "[Gloo]" not in line] for e in (first, second)]
    assert lines[0][:-1] == lines[1][:-1], first.err + second.err
    text = "\n".join(lines[0])
    host = socket.gethostname()
    for expected in (
        "> HostError the processes differ in the flags: all must be started with the same",
        f"  process 1 ({host}): --b=0\n  process 1 ({host}): --c=xxx",
        "  processes [0]: --b=1\n  processes [0]: --c=xxx",
        "> went well\n",
        f"> HostError opening failed on process 1 ({host}): no shard 2\n",
        "> HostError opening failed on every process: both\n",
        f"> HostError opening failed on process 0 ({host}): KeyError: 'own'\n"
        f"opening failed on process 1 ({host}): other\n",
        f"> HostError inner failed on process 1 ({host}): deep\n> True\n> False\n",
        "> True\n> True\n> True\n> (4, 2)\n",
        "> HostError the processes run different programs: process",
    ):
        assert expected in text, text
    assert "several processes must use all, so choose sizes whose product is 4" in text
    assert (first.code, second.code) == (0, 0)


GONE = """
import time
if not mesh.is_main():
    raise SystemExit("had enough")
try:
    mesh.agree("the flags", 1)
except ValueError as error:
    print(error)
"""


def test_a_process_that_ends_is_not_waited_for():
    first, second = run_processes(GONE, timeout=30)
    assert first.out == "process 1 ended before the flags: see what it said\n", first.err
    assert "had enough" in second.err and second.code == 1


LEAVE = """
print("x", flush=True)
if mesh.is_main():  # waits for the other's part of a sum
    from jax.experimental import multihost_utils
    multihost_utils.process_allgather(jax.numpy.ones(2))
else:
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        print(error, file=sys.stderr)
        mesh.leave(3)
"""


def test_a_process_that_breaks_ends_all():
    first, second = run_processes(LEAVE, timeout=50)
    assert second.code == 3 and second.err.endswith("a bug\n")
    assert first.code == 1 and "process 1 (" in first.err and "see what it said" in first.err


def test_an_address_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script = (
            "from sinkjax import mesh\n"
            f"try: mesh.initialize('localhost:{port}', 2, 0)\n"
            "except ValueError as error: print(error)"
        )
        (ended,) = run_python([["-c", script]])
    assert f"process 0 cannot serve at port {port}: " in ended.out, ended.err
