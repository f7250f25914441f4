"""Measures what a bounded cache keeps: perplexity along a text, recall in a stream.

Usage: python -m sinkjax.evaluate perplexity --out DIR [--text sotu] [--tokens 16384] …
       python -m sinkjax.evaluate streameval --out DIR [--lines 1000] [--every 10] [--back 20] …

Writes tables (.csv) and a figure (.png) into DIR, and prints the summary.
"""

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from sinkjax import analysis, cli
from sinkjax.analysis import perplexity, streameval
from sinkjax.caches import SinkRing
from sinkjax.mesh import agree, is_main, together

FLAGS = flags.FLAGS
ONLY = {  # flags that one subcommand alone reads
    "perplexity": ("text", "tokens", "recompute_samples"),
    "streameval": ("lines", "every", "back", "seed"),
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
    with replaced(folder / "perplexity.png") as path:
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
    with replaced(folder / "streameval.png") as path:
        figure.savefig(path, format="png")
    return summary


def _marks(recall: analysis.Recall) -> tuple[int, str, str]:
    return len(recall.correct), f"{recall.accuracy:.4g}", f"{recall.nll.mean():.4g}"


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to; what was written there takes its name when it is whole. Of several
    processes, one keeps what it wrote."""
    with together(f"writing {path}"):
        if not is_main():
            yield Path(os.devnull)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV (UTF-8, lines end with "\\n"), whole or not at all."""
    with replaced(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([str(row[0]).ljust(widths[0]), *cells[1:]]))


def run_perplexity() -> list[Sequence[Any]]:
    modes = FLAGS.modes or perplexity.MODES
    perplexity.check_modes(modes, perplexity.MODES)
    if FLAGS.tokens < 1:
        raise ValueError(f"--tokens must be ≥ 1, got {FLAGS.tokens}")
    with together(f"reading {FLAGS.text}"):
        text = perplexity.load_text(FLAGS.text)
    agree("the text", text)
    lm = cli.load_model()
    ids = perplexity.text_ids(text, lm.tokenizer, FLAGS.tokens + 1)
    print(f"{lm.name}: the first {FLAGS.tokens:,} tokens of {FLAGS.text}")
    curves = analysis.perplexity_curves(
        lm,
        ids,
        sinks=FLAGS.sinks,
        window=FLAGS.window,
        modes=modes,
        recompute_samples=FLAGS.recompute_samples,
        chunk=FLAGS.chunk,
        progress=is_main(),
    )
    context = lm.config.trained_context
    return save_perplexity(curves, Path(FLAGS.out), bucket=FLAGS.bucket, trained_context=context)


def run_streameval() -> list[Sequence[Any]]:
    modes = FLAGS.modes or streameval.MODES
    perplexity.check_modes(modes, streameval.MODES)
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
        chunk=FLAGS.chunk,
        progress=is_main(),
    )
    capacity = SinkRing(FLAGS.sinks, FLAGS.window).capacity
    return save_recall(results, Path(FLAGS.out), bucket=FLAGS.bucket, capacity=capacity)


def main(argv: list[str]) -> None:
    commands = {"perplexity": run_perplexity, "streameval": run_streameval}
    if len(argv) != 1 or argv[0] not in commands:
        raise app.UsageError(f"expected one of {', '.join(commands)}, got {' '.join(argv)!r}")
    [other] = commands.keys() - argv
    for name in ONLY[other]:
        if FLAGS[name].present:
            raise app.UsageError(f"--{name} belongs to {other}, not to {argv[0]}")
    print_table(commands[argv[0]]())


def define_flags() -> None:
    cli.define_model_flags()
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
    flags.DEFINE_integer("seed", 0, "Of the stream's names and values.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
