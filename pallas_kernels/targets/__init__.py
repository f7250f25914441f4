"""Compiling for a chip that is not here.

    sharding = targets.sharding("v5e")
    shapes = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
    compiled = jax.jit(f).lower(shapes).compile()

TPUs need the wheel `libtpu`; an NVIDIA GPU those of `jax[cuda13]` (of them `jax-cuda13-plugin`,
`jax-cuda13-pjrt`, `nvidia-cuda-nvcc` and `nvidia-cudnn-cu13` are enough).
"""

import functools
import os
import pathlib

import jax
from jax.experimental import topologies

_TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
_GPUS = {"h200": "1x1x1"}
NAMES = (*_TPUS, *_GPUS)
# Slices as Google Cloud sells them: v5p counts cores, two a chip; the others count chips.
SLICES = {"v5e-4": "v5e:2x2", "v6e-4": "v6e:2x2", "v5p-8": "v5p:2x2x1", "v6e-16": "v6e:4x4"}


@functools.cache
def devices(name: str) -> tuple[jax.Device, ...]:
    """The devices of a slice of four TPU chips, of one in `SLICES`, or of one GPU.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the wheels that compile for it are not installed.
    """
    if topology_name := (_TPUS | SLICES).get(name):
        # libtpu else asks a metadata server that is not there, and locks the chip that is not.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    elif name in _GPUS:
        config = pathlib.Path(__file__).with_name(f"{name}.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=_GPUS[name], target_config=config
        )
    else:
        raise ValueError(f"targets are {', '.join((*NAMES, *SLICES))}, got {name!r}")
    return tuple(topology.devices)


def sharding(name: str) -> jax.sharding.SingleDeviceSharding:
    """For the arguments of a program that one device of this name shall run."""
    return jax.sharding.SingleDeviceSharding(devices(name)[0])
