"""Measures what a cache keeps: perplexity along a text, recall in a stream and from far back.

Usage: python -m sinkjax.evaluate perplexity --out DIR [--text sotu] [--tokens 16384] …
       python -m sinkjax.evaluate streameval --out DIR [--lines 1000] [--every 10] [--back 20] …
       python -m sinkjax.evaluate passkey --out DIR [--cache full --cache ring:4+1020] …
       python -m sinkjax.evaluate needle --out DIR [--lengths 512,1024,2048] [--depths 0,0.5,1] …

Writes tables (.csv) and a figure (.png) into DIR, and prints the summary.
"""

import contextlib
import csv
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Float
from tqdm import tqdm

from sinkjax import analysis, cli
from sinkjax.analysis import passkey, perplexity, streameval
from sinkjax.caches import SinkRing
from sinkjax.files import replaced
from sinkjax.mesh import agree, is_main, together

FLAGS = flags.FLAGS
GRIDS = ("passkey", "needle")
STREAMS = ("perplexity", "streameval")
OF = {  # flags that not all subcommands read
    "text": ("perplexity", *GRIDS),
    "tokens": ("perplexity",),
    "recompute_samples": ("perplexity",),
    "sinks": STREAMS,
    "window": STREAMS,
    "modes": STREAMS,
    "bucket": STREAMS,
    "lines": ("streameval",),
    "every": ("streameval",),
    "back": ("streameval",),
    "seed": ("streameval", *GRIDS),
    "lengths": GRIDS,
    "depths": GRIDS,
    "samples": GRIDS,
    "words": ("passkey",),
    "keys": ("passkey",),
}


def save_perplexity(
    curves: Mapping[str, analysis.Curve],
    folder: Path,
    *,
    bucket: int,
    trained_context: int | None = None,
) -> list[Sequence[Any]]:
    """Writes `perplexity.csv` (a token a row), `summary.csv` and `perplexity.png`.

    Where there are `recompute` and `streaming`, the summary has a row `streaming_at_samples`: the
    latter at the positions of the former, so that the two can be compared.

    Returns:
        The rows of the summary, its head first.
    """
    tokens = (
        (position, mode, repr(float(nll)))
        for mode, curve in curves.items()
        for position, nll in zip(curve.positions, curve.nll, strict=True)
    )
    write_table(folder / "perplexity.csv", [("position", "mode", "nll"), *tokens])
    rows = dict(curves)
    if "recompute" in curves and "streaming" in curves:
        samples = curves["recompute"].positions
        rows["streaming_at_samples"] = curves["streaming"].at(samples)
    head = ("mode", "tokens", "perplexity", "perplexity_last_bucket", "tokens_per_second")
    summary: list[Sequence[Any]] = [head]
    for mode, curve in rows.items():
        last = curve.buckets(bucket)[-1].perplexity
        figures = (curve.perplexity, last, curve.tokens_per_second)
        summary.append((mode, len(curve.nll), *(f"{x:.5g}" for x in figures)))
    write_table(folder / "summary.csv", summary)
    figure = analysis.plot_curves(curves, bucket=bucket, trained_context=trained_context)
    with written(folder / "perplexity.png") as path:
        figure.savefig(path, format="png")
    return summary


def save_recall(
    results: Mapping[str, analysis.Recall],
    folder: Path,
    *,
    bucket: int,
    capacity: int | None = None,
) -> list[Sequence[Any]]:
    """Writes `streameval.csv`, a row a mode and bucket, and `streameval.png`.

    Returns:
        The rows of a summary, its head first.
    """
    rows: list[Sequence[Any]] = [
        ("mode", "lines", "tokens", "questions", "accuracy", "answer_nll"),
    ]
    summary: list[Sequence[Any]] = [("mode", "questions", "accuracy", "answer_nll")]
    for mode, recall in results.items():
        for part in recall.buckets(bucket):
            so_far = (mode, part.lines[-1], part.tokens[-1])
            rows.append((*so_far, *_marks(part)))
        summary.append((mode, *_marks(recall)))
    write_table(folder / "streameval.csv", rows)
    figure = analysis.plot_recall(results, bucket=bucket, capacity=capacity)
    with written(folder / "streameval.png") as path:
        figure.savefig(path, format="png")
    return summary


def save_grids(
    name: str,
    prompts: Sequence[analysis.Prompt],
    marks: Mapping[str, Float[np.ndarray, " P"]],
    cache_bytes: Mapping[str, int],
    folder: Path,
) -> list[Sequence[Any]]:
    """Writes `NAME.csv`, a row a policy and prompt, `NAME_summary.csv` and `NAME.png`.

    Args:
        name: of the files.
        prompts: which were marked.
        marks: of each prompt, by policy.
        cache_bytes: what a row of each policy holds.

    Returns:
        The rows of the summary, its head first.
    """
    rows = [
        (policy, p.length, p.depth, p.sample, f"{mark:.6g}")
        for policy, values in marks.items()
        for p, mark in zip(prompts, values, strict=True)
    ]
    head = ("cache", "length", "depth", "sample", "recall")
    write_table(folder / f"{name}.csv", [head, *rows])
    grids = {policy: analysis.Grid.of(prompts, values) for policy, values in marks.items()}
    summary: list[Sequence[Any]] = [("cache", "recall", "lowest_cell", "cache_bytes")]
    for policy, grid in grids.items():
        figures = (f"{x:.4g}" for x in (grid.mean, grid.recall.min()))
        summary.append((policy, *figures, cache_bytes[policy]))
    write_table(folder / f"{name}_summary.csv", summary)
    with written(folder / f"{name}.png") as path:
        analysis.plot_grids(grids).savefig(path, format="png")
    return summary


def _marks(recall: analysis.Recall) -> tuple[int, str, str]:
    return len(recall.correct), f"{recall.accuracy:.4g}", f"{recall.nll.mean():.4g}"


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to, as `replaced` gives it. Of several processes, one keeps what it wrote."""
    with together(f"writing {path}"):
        if not is_main():
            yield Path(os.devnull)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            yield part


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV (UTF-8, lines end with "\\n"), whole or not at all."""
    with written(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([str(row[0]).ljust(widths[0]), *cells[1:]]))


def load_text() -> str:
    """The text that the flags name, the same on all hosts."""
    with together(f"reading {FLAGS.text}"):
        text = perplexity.load_text(FLAGS.text)
    agree("the text", text)
    return text


def modes_from_flags(known: Sequence[str]) -> Sequence[str]:
    """Those that are named; all of them where none are. With other caches, `--modes=` is none."""
    modes = FLAGS.modes or (() if FLAGS.cache and FLAGS["modes"].present else known)
    perplexity.check_modes(modes, known, FLAGS.cache)
    return modes


def run_perplexity() -> list[Sequence[Any]]:
    modes = modes_from_flags(perplexity.MODES)
    if FLAGS.tokens < 1:
        raise ValueError(f"--tokens must be ≥ 1, got {FLAGS.tokens}")
    caches = cli.cache_policies(FLAGS.cache, tokens=FLAGS.tokens)
    text = load_text()
    lm = cli.load_model()
    ids = perplexity.text_ids(text, lm.tokenizer, FLAGS.tokens + 1)
    print(f"{lm.name}: the first {FLAGS.tokens:,} tokens of {FLAGS.text}")
    curves = analysis.perplexity_curves(
        lm,
        ids,
        sinks=FLAGS.sinks,
        window=FLAGS.window,
        modes=modes,
        caches=caches,
        recompute_samples=FLAGS.recompute_samples,
        chunk=FLAGS.chunk,
        progress=is_main(),
    )
    context = lm.config.trained_context
    return save_perplexity(curves, Path(FLAGS.out), bucket=FLAGS.bucket, trained_context=context)


def run_streameval() -> list[Sequence[Any]]:
    modes = modes_from_flags(streameval.MODES)
    cli.cache_policies(FLAGS.cache, tokens=1)  # what is wrong is said before the model is loaded
    lm = cli.load_model()
    task = streameval.Task.make(
        lambda text: lm.tokenizer.encode(text, add_bos=False),
        lines=FLAGS.lines,
        every=FLAGS.every,
        back=FLAGS.back,
        seed=FLAGS.seed,
        start=lm.tokenizer.encode(""),  # a beginning-of-text token, where the model wants one
    )
    print(f"{lm.name}: {FLAGS.lines:,} lines, {len(task.token_ids):,} tokens")
    results = analysis.stream_recall(
        lm,
        task,
        sinks=FLAGS.sinks,
        window=FLAGS.window,
        modes=modes,
        caches=cli.cache_policies(FLAGS.cache, tokens=len(task.token_ids)),
        chunk=FLAGS.chunk,
        progress=is_main(),
    )
    capacity = SinkRing(FLAGS.sinks, FLAGS.window).capacity
    return save_recall(results, Path(FLAGS.out), bucket=FLAGS.bucket, capacity=capacity)


def run_passkey() -> list[Sequence[Any]]:
    return _run_grid(
        "passkey",
        functools.partial(analysis.passkey_prompts, words=FLAGS.words, keys=FLAGS.keys),
        analysis.recall_by_reading,
    )


def run_needle() -> list[Sequence[Any]]:
    return _run_grid("needle", analysis.needle_prompts, analysis.recall_by_writing)


def _run_grid(
    name: str, make: Callable[..., list[analysis.Prompt]], mark: Callable[..., np.ndarray]
) -> list[Sequence[Any]]:
    lengths, depths = _numbers("lengths", int), _numbers("depths", float)
    specs = FLAGS.cache or ["full", "ring:4+1020"]
    cli.cache_policies(specs, tokens=1)
    text = load_text()
    lm = cli.load_model()

    def encode(piece: str) -> list[int]:
        return lm.tokenizer.encode(piece, add_bos=False)

    # The longest prompt needs no more tokens than its length, and each has its own part if it can.
    haystack = encode(text[: 8 * max(lengths, default=0) * max(1, FLAGS.samples) + 1024])
    prompts = make(
        encode,
        haystack,
        lengths=lengths,
        depths=depths,
        samples=FLAGS.samples,
        seed=FLAGS.seed,
        start=lm.tokenizer.encode(""),
    )
    room = max(len(p.token_ids) + len(p.answer_ids) for p in prompts)
    if mark is analysis.recall_by_writing:
        room += passkey.SPARE
    policies = cli.cache_policies(specs, tokens=room)
    for policy in policies.values():  # before any of them takes its time
        policy.check(room)
    print(f"{lm.name}: {len(prompts):,} prompts of {', '.join(map(str, lengths))} tokens")
    marks = {}
    for spec, policy in policies.items():
        total = sum(len(p.token_ids) for p in prompts)
        with tqdm(total=total, desc=spec, unit="token", disable=not is_main()) as bar:
            marks[spec] = mark(lm, prompts, policy, chunk=FLAGS.chunk, progress=bar.update)
    sizes = {spec: lm.cache_bytes(policy) for spec, policy in policies.items()}
    return save_grids(name, prompts, marks, sizes, Path(FLAGS.out))


def _numbers(flag: str, kind: type) -> list:
    try:
        return [kind(value) for value in getattr(FLAGS, flag)]
    except ValueError as error:
        raise ValueError(f"--{flag} must be numbers, such as {FLAGS[flag].default}") from error


def main(argv: list[str]) -> None:
    commands = {
        "perplexity": run_perplexity,
        "streameval": run_streameval,
        "passkey": run_passkey,
        "needle": run_needle,
    }
    if len(argv) != 1 or argv[0] not in commands:
        raise app.UsageError(f"expected one of {', '.join(commands)}, got {' '.join(argv)!r}")
    for name, readers in OF.items():
        if FLAGS[name].present and argv[0] not in readers:
            belongs = " and ".join(readers)
            raise app.UsageError(f"--{name} belongs to {belongs}, not to {argv[0]}")
    print_table(commands[argv[0]]())


def define_flags() -> None:
    cli.define_model_flags()
    cli.define_cache_flag(
        None,
        "perplexity, streameval: besides --modes; passkey, needle: by default, full and "
        "ring:4+1020. A full cache without a size has room for all.",
    )
    flags.DEFINE_string("out", None, "The folder for tables and figures.", required=True)
    flags.DEFINE_integer("sinks", 4, "First tokens that streaming keeps for ever.")
    flags.DEFINE_integer("window", 1020, "Newest tokens that it keeps; all caches are as large.")
    flags.DEFINE_list("modes", [], "Some of dense, window, recompute (perplexity), streaming.")
    flags.DEFINE_integer("bucket", 1024, "Tokens that a point of the figure stands for.", 1)
    flags.DEFINE_integer("chunk", 128, "Tokens per call; changes speed and memory alone.", 1)
    flags.DEFINE_string("text", "sotu", "A file, a folder of files, or a built-in text.")
    flags.DEFINE_integer("tokens", 16384, "How much of the text to score.")
    flags.DEFINE_integer("recompute_samples", 256, "Positions that recompute scores; 0: all.", 0)
    flags.DEFINE_integer("lines", 1000, "Lines of the stream.")
    flags.DEFINE_integer("every", 10, "Lines between questions.")
    flags.DEFINE_integer("back", 20, "How many lines back a question asks.")
    flags.DEFINE_integer("seed", 0, "Of the names and values, words and places that are drawn.")
    flags.DEFINE_list("lengths", ["512", "1024", "2048"], "Of prompts, in tokens.")
    flags.DEFINE_list("depths", ["0", "0.25", "0.5", "0.75", "1"], "Where the answer is hidden.")
    flags.DEFINE_integer("samples", 1, "Prompts for each length and depth.")
    flags.DEFINE_integer("words", 32, "Of a passkey.")
    flags.DEFINE_integer("keys", 1, "Passkeys in a prompt, of which one is asked for.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
