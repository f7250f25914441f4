"""How a command runs: flags in, one clear line where something is wrong with the input."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from absl import app, flags

from sinkjax import mesh
from sinkjax.caches import HeadSplit, Policy, parse_policy
from sinkjax.checkpoints.builtin import cache_folder
from sinkjax.streaming import LanguageModel

FLAGS = flags.FLAGS
_PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")


def define_model_flags() -> None:
    """The flags by which every command chooses and runs a model."""
    flags.DEFINE_string(
        "model",
        "smollm2-135m-instruct",
        "The built-in model, a GGUF file, a Hugging Face folder, a converted folder, or a hub id.",
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of weights, activations and cache."
    )
    flags.DEFINE_enum(
        "weight_dtype", None, ["int8"], "Of the matrices of the model; by default, --dtype."
    )
    flags.DEFINE_enum(
        "attention_backend",
        None,
        ["reference", "xla", "tpu", "gpu"],
        "How attention is computed; by default, the kernel of this platform where there is one.",
    )
    flags.DEFINE_string(
        "mesh",
        None,
        "The devices to spread the model (its heads, MLPs and vocabulary) and the rows of a batch "
        "over, such as model=4,data=2; by default, one.",
    )


def define_cache_flag(default: str | None, help: str) -> None:
    """The flag by which every command takes cache policies: one, or any number without default."""
    form = "What to remember: ring:SINKS+WINDOW, full:TOKENS, duo:PATTERN@SPARSITY,SINKS+WINDOW"
    text = f"{form},TOKENS; with ,int8 or ,int4 for quantised keys and values. {help}"
    if default is None:
        flags.DEFINE_multi_string("cache", [], f"{text} May be given several times.")
    else:
        flags.DEFINE_string("cache", default, text)


def cache_policy(spec: str, *, tokens: int | None = None) -> Policy:
    """The policy that a text describes (see `parse_policy`), the same on all hosts."""
    with mesh.together(f"reading --cache {spec}"):
        policy = parse_policy(spec, tokens=tokens)
    mesh.agree(f"the cache {spec}", policy)
    return policy


def cache_policies(specs: Sequence[str], *, tokens: int) -> dict[str, Policy]:
    """The policies by their texts.

    Args:
        specs: see `parse_policy`.
        tokens: how many a full cache holds where its text does not say.

    Raises:
        ValueError: a text that is given twice; otherwise as `parse_policy`.
    """
    if len(set(specs)) != len(specs):
        raise ValueError(f"--cache must name each policy once, got {', '.join(specs)}")
    return {spec: cache_policy(spec, tokens=tokens) for spec in specs}


def define_process_flags() -> None:
    """The flags by which processes of one program on several hosts find each other."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, where a program runs on several hosts. Not needed on TPU pods, "
        "nor under Slurm or Open MPI: they are found.",
    )
    flags.DEFINE_integer("num_processes", None, "Of the program; see --coordinator_address.")
    flags.DEFINE_integer("process_id", None, "Of this process: 0, 1, …")


def load_model(cache: Policy | None = None) -> LanguageModel:
    """The model that the flags name, on the devices that they name; its heads lie as a cache has
    them."""
    if FLAGS.mesh is None and mesh.several():
        devices = jax.device_count()
        raise ValueError(
            f"{jax.process_count()} processes run this command: say how their {devices} devices "
            f"share the work, for example --mesh model={devices}"
        )
    return LanguageModel.load(
        FLAGS.model,
        dtype=FLAGS.dtype,
        attention_backend=FLAGS.attention_backend,
        mesh=None if FLAGS.mesh is None else mesh.make(FLAGS.mesh),
        heads=np.asarray(cache.pattern) if isinstance(cache, HeadSplit) else None,
        weight_dtype=FLAGS.weight_dtype,
    )


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Parses the flags, calls `main` with the other arguments, and exits.

    A usage error, a ValueError or an OSError ends as one message on stderr and exit code 2; any
    other exception is a bug, and keeps its traceback. Define flags under
    `if __name__ == "__main__":`, so that commands that share a name can be imported together.

    Args:
        main: takes the positional arguments; raises `app.UsageError` where they are wrong.
    """

    define_process_flags()

    def parse(argv: list[str]) -> list[str]:
        rest, problem = argv, None
        try:
            rest = FLAGS(argv)
        except flags.Error as error:
            problem = f"{error} (--help lists the flags)"
        try:
            _join(argv, rest, problem)
        except ValueError as error:
            _fail(str(error))
        if jax.config.jax_compilation_cache_dir is None:  # a step takes ten seconds to compile
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        verbosity = FLAGS["verbosity"]
        if verbosity.using_default_value:  # absl would show whatever libraries log
            verbosity.value, verbosity.using_default_value = -1, False
        return rest

    def guarded(argv: list[str]) -> None:
        try:
            main(argv[1:])
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (app.UsageError, ValueError, OSError) as error:
            _fail(str(error))
        except KeyboardInterrupt:
            mesh.leave(130)
        except Exception:
            if not mesh.several():
                raise
            traceback.print_exc()
            mesh.leave(1)

    app.run(guarded, flags_parser=parse)


def _join(argv: list[str], rest: list[str], problem: str | None) -> None:
    """Joins the other processes, and sees to it that all were started alike. Raises ValueError.

    A process that was started with wrong flags joins too, so that the others hear of it.
    """
    if problem is None:
        place = [FLAGS[name].value for name in _PROCESS_FLAGS]
    else:
        place = [_said(argv, name) for name in _PROCESS_FLAGS]
    try:
        mesh.initialize(*place)
    except ValueError as error:
        raise ValueError(problem or str(error)) from error
    with mesh.together("reading the flags"):
        if problem is not None:
            raise ValueError(problem)
    own = ("coordinator_address", "process_id")
    values = {n: v for n, v in FLAGS.flag_values_dict().items() if n not in own}
    mesh.agree("their flags", "\n".join([*(f"--{n}={v!r}" for n, v in values.items()), *rest[1:]]))
    if not mesh.is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def _said(argv: list[str], name: str) -> str | int | None:
    """The value of a flag, where other flags are wrong."""
    for i, said in enumerate(argv[1:], 1):
        flag, _, value = said.lstrip("-").partition("=")
        if said.startswith("-") and flag == name:
            value = value or (argv[i + 1] if i + 1 < len(argv) else "")
            return int(value) if value.isdigit() else value
    return None


def _fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr)
    mesh.leave(2)
