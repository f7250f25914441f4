"""How a command runs: flags in, one clear line where something is wrong with the input."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags

from sinkjax.checkpoints.builtin import cache_folder
from sinkjax.streaming import LanguageModel

FLAGS = flags.FLAGS


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
        "attention_backend",
        None,
        ["reference", "xla", "tpu", "gpu"],
        "How attention is computed; by default, the kernel of this platform where there is one.",
    )


def load_model() -> LanguageModel:
    """The model that the flags name."""
    return LanguageModel.load(
        FLAGS.model, dtype=FLAGS.dtype, attention_backend=FLAGS.attention_backend
    )


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Parses the flags, calls `main` with the other arguments, and exits.

    A usage error, a ValueError or an OSError ends as one message on stderr and exit code 2; any
    other exception is a bug, and keeps its traceback. Define flags under
    `if __name__ == "__main__":`, so that commands that share a name can be imported together.

    Args:
        main: takes the positional arguments; raises `app.UsageError` where they are wrong.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = FLAGS(argv)
        except flags.Error as error:
            _fail(f"{error} (--help lists the flags)")
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
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def _fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr)
    sys.exit(2)
