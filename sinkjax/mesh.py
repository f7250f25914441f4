"""Many devices and many hosts: the mesh, what is split over which axis, and what hosts agree on.

A mesh has two axes: `data` takes the rows of a batch, `model` takes heads, MLP width and
vocabulary. One program runs on every host. What may go wrong on one host alone (a file that is
missing there, other arguments) is made to go wrong on all, with the same message, by `agree` and
`together`: a host that raised by itself would leave the others waiting in their next collective.
They talk through jax's coordination service, before and without any device.
"""

import atexit
import collections
import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import clusters, distributed  # jax has no public name for either
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

DATA, MODEL = AXES = ("data", "model")
# What an axis of an array means → the axis of the mesh that splits it. All others are replicated.
RULES = {"batch": DATA, "heads": MODEL, "mlp": MODEL, "vocab": MODEL}

_SHOWN = 160  # characters of a line in a message
_GONE, _BROKEN = "sinkjax/gone/", "sinkjax/broken/"
_turns = itertools.count()


class HostError(ValueError):
    """What went wrong on some host. Raised on every host alike."""


def parse(spec: str) -> dict[str, int]:
    """The axes of a mesh from text such as `model=4,data=2`; an axis that is not named has size 1.

    Raises:
        ValueError: an unknown or repeated axis, or a size that is no whole number ≥ 1.
    """
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or axis in sizes:
            wrong = "names the axis twice:" if axis in sizes else "has no axis"
            raise ValueError(
                f"mesh {spec!r} {wrong} {axis!r}: expected sizes of {' and '.join(AXES)}, "
                "such as 'model=4,data=2'"
            )
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(
                f"mesh {spec!r} has the size {size!r} for {axis}: expected a whole number ≥ 1, "
                "such as in 'model=4,data=2'"
            )
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make(spec: str) -> Mesh:
    """A mesh of this machine's devices, or of those of all processes.

    In one process, a mesh may be smaller than the machine: it takes the first devices. Several
    processes must use all of theirs.

    Args:
        spec: see `parse`.

    Raises:
        ValueError: as `parse`, or there are not as many devices.
    """
    sizes = parse(spec)
    wanted, there = sizes[DATA] * sizes[MODEL], jax.device_count()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"these devices belong to {jax.process_count()} processes that do not know each other: "
            "call sinkjax.mesh.initialize() before anything else that uses jax"
        )
    if wanted > there:
        raise ValueError(
            f"mesh {spec!r} needs {wanted} devices, and there are {there} "
            f"({jax.devices()[0].device_kind}): choose sizes whose product is at most {there}"
        )
    if wanted < there and jax.process_count() > 1:
        raise ValueError(
            f"mesh {spec!r} takes {wanted} of the {there} devices of {jax.process_count()} "
            f"processes: several processes must use all, so choose sizes whose product is {there}"
        )
    return over(jax.devices()[:wanted], sizes)


def over(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> Mesh:
    """A mesh of just these devices, near ones side by side.

    Args:
        devices: as many as the product of the sizes.
        sizes: of each of `AXES`.
    """
    # Without splitting, a slice of 4 × 4 chips makes no mesh of 2 × 8.
    grid = mesh_utils.create_device_mesh(
        [sizes[axis] for axis in AXES], devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(names: tuple[str | None, ...]) -> PartitionSpec:
    """How an array is split, from what its axes mean (see `RULES`)."""
    return PartitionSpec(*(None if name is None else RULES.get(name) for name in names))


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of one program, where there are several. Call it before jax sees devices.

    Without arguments it finds TPU pods, Slurm and Open MPI by itself, and on a single machine does
    nothing. Then, as everywhere with `jax.distributed`, every process must be started within five
    minutes; jax ends those that have waited in vain.

    Args:
        coordinator_address: `host:port` of process 0; None: `$JAX_COORDINATOR_ADDRESS`.
        num_processes: of the program.
        process_id: of this process, 0 … num_processes − 1.

    Raises:
        ValueError: arguments that do not go together, or an address that is in use.
    """
    if jax.distributed.is_initialized():
        return
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = (address, num_processes, process_id)
    if given == (None, None, None) and not _started_as_one_of_several():
        return
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator_address must be host:port, got {address!r}")
    if address is not None and process_id == 0:
        _check_free(int(address.rpartition(":")[2]))
    late = threading.Timer(10, _say_that_we_wait, [address, num_processes])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{error} Give coordinator_address, num_processes and process_id, all three, where "
            "no TPU pod, Slurm or Open MPI says them"
        ) from error
    finally:
        late.cancel()
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=[over], daemon=True)
    watch.start()
    atexit.register(_end, over, watch)


def _started_as_one_of_several() -> bool:
    """Whether the environment is one that jax knows, with more than one process."""
    kinds: list[type[clusters.ClusterEnv]] = [clusters.OmpiCluster, clusters.SlurmCluster]
    if "tpu" in (jax.config.jax_platforms or "tpu"):
        kinds += [clusters.GkeTpuCluster, clusters.GceTpuCluster]
    for kind in kinds:
        try:
            if kind.is_env_present():
                return kind.get_process_count() > 1
        except OSError:  # a TPU without the metadata server of a pod
            continue
        except RuntimeError as error:
            raise ValueError(f"cannot find the other processes: {error}") from error
    return False


def _check_free(port: int) -> None:
    """jax ends with a segmentation fault where it can't have its port."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(f"process 0 cannot serve at port {port}: {error}") from error


def _say_that_we_wait(address: str | None, processes: int | None) -> None:
    print(
        f"waiting for all {processes or ''} processes to start"
        + (f" (process 0 at {address})" if address else ""),
        file=sys.stderr,
        flush=True,
    )


def _watch(over: threading.Event) -> None:
    """Ends this process when another has broken: it may be waiting for that one in a collective."""
    while not over.wait(2):
        try:
            broken = dict(_client().key_value_dir_get(_BROKEN))
        except Exception:  # the service has ended, of which jax says what is to be said
            return
        if broken:
            print(f"{', '.join(broken.values())} failed: see what it said", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)


def _end(over: threading.Event, watch: threading.Thread) -> None:
    over.set()
    watch.join()
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_GONE}{distributed.global_state.process_id}", "")


def is_main() -> bool:
    """Whether this process is the one that prints, and writes text."""
    return distributed.global_state.process_id == 0


def several() -> bool:
    """Whether this program has more than one process."""
    return distributed.global_state.num_processes > 1


def agree(what: str, value: object) -> None:
    """Checks that every process holds the same value; of one process, nothing.

    Args:
        what: for the message, such as "the flags".
        value: compared as text, line by line; a message shows the lines that differ.

    Raises:
        HostError: on every process, and says which differs from the others, and in what.
    """
    if not several():
        return
    lines = [_short(line) for line in str(value).splitlines()]
    if len(lines) > 1000:
        lines = [_digest(str(value))]
    answers = _exchange(what, lines)
    common, _ = collections.Counter(tuple(held) for _, held in answers).most_common(1)[0]
    if all(tuple(held) == common for _, held in answers):
        return
    others = [i for i, (_, held) in enumerate(answers) if tuple(held) == common]
    said = [f"the processes differ in {what}: all must be started with the same"]
    for i, (host, held) in enumerate(answers):
        if tuple(held) != common:
            said += [f"  process {i} ({host}): {line}" for line in held if line not in common]
            said += [f"  processes {others}: {line}" for line in common if line not in held]
    raise HostError("\n".join(said))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a block in which some process may fail alone: then it fails in every process.

    Every process enters the block, and waits at its end for the others. No collective may be in
    it, in which one that succeeds would wait for one that failed. In one process: nothing.

    Args:
        what: for the message, such as "reading the checkpoint".

    Raises:
        HostError: on every process; it names those that failed, and says what they said.
    """
    if not several():
        yield
        return
    failure = None
    try:
        yield
    except HostError:
        raise  # all have it already
    except Exception as error:
        failure = error
    kind = "" if isinstance(failure, ValueError | OSError) else f"{type(failure).__name__}: "
    answers = _exchange(what, None if failure is None else f"{kind}{failure}"[:4000])
    if failed := {i: answer for i, answer in enumerate(answers) if answer[1] is not None}:
        if len(failed) == len(answers) and len({said for _, said in failed.values()}) == 1:
            raise HostError(f"{what} failed on every process: {answers[0][1]}") from failure
        raise HostError(
            "\n".join(
                f"{what} failed on process {i} ({host}): {said}"
                for i, (host, said) in failed.items()
            )
        ) from failure


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in some process. Every process asks."""
    return flag if not several() else any(said for _, said in _exchange("a signal", bool(flag)))


def fetch(array: jax.Array) -> np.ndarray:
    """A small array, whole, on every process. If it is spread over processes, all must call."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def leave(code: int) -> NoReturn:
    """Ends this process after an error.

    An error that all processes have ends them all in good order. One that has it alone ends the
    others too: they may wait for it in a collective, and jax would wait for them at its exit.
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        client, me = _client(), distributed.global_state.process_id
        try:
            client.wait_at_barrier("sinkjax/leave", 5_000)
        except Exception:
            with contextlib.suppress(Exception):
                client.key_value_set(f"{_BROKEN}{me}", f"process {me} ({socket.gethostname()})")
                if me == 0:
                    time.sleep(4)  # until all have seen it: the service ends with this process
            os._exit(code)
    sys.exit(code)


def _client() -> Any:
    """Of the coordination service, which holds text under keys for all processes."""
    return distributed.global_state.client


def _exchange(what: str, value: Any) -> list[tuple[str, Any]]:
    """What every process says at this point: host name and value, in the order of processes."""
    state, client = distributed.global_state, _client()
    me, turn = state.process_id, next(_turns)
    client.key_value_set(f"sinkjax/{turn}/{me}", json.dumps([what, socket.gethostname(), value]))
    answers = []
    for other in range(state.num_processes):
        at, host, said = json.loads(_answer(f"sinkjax/{turn}/{other}", what, other))
        if at != what:
            raise HostError(
                f"the processes run different programs: process {me} is at {what!r}, "
                f"process {other} ({host}) at {at!r}"
            )
        answers.append((host, said))
    if turn:  # all are here, so all have read what was said the last time
        client.key_value_delete(f"sinkjax/{turn - 1}/{me}")
    return answers


def _answer(key: str, what: str, other: int) -> str:
    """Waits for as long as the other process lives: it may be reading a large file."""
    client = _client()
    gone = False
    while True:
        try:
            return client.blocking_key_value_get(key, 1000)  # short, so that Ctrl-C gets through
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if gone:
            raise HostError(f"process {other} ended before {what}: see what it said")
        gone = f"{_GONE}{other}" in dict(client.key_value_dir_get(_GONE))


def _short(line: str) -> str:
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN // 2]}… {_digest(line)}"


def _digest(text: str) -> str:
    return f"(sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"
