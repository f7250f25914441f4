"""Times sinkjax and its peers on this machine, in turn, several rounds, and prints a table.

    bash scripts/peers.sh all
    python scripts/bench_cpu.py [--rounds 3]

Run it with the project's own Python (`.venv/bin/python`). Machines are noisy: a peer is compared
with the sinkjax run of its own round, and the median of those ratios is what counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

PEERS = {
    "transformers": "oracle",
    "attention_sinks": "attention_sinks",
    "ctranslate2": "oracle",
    "onnxruntime-genai": "oracle",
}
FIGURES = ("decode_tokens_per_s", "prefill_tokens_per_s")


def measured(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    arguments = parser.parse_args()
    here = Path(__file__).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkjax" / "peers"
    commands = {"sinkjax": [sys.executable, "-m", "sinkjax.bench", "speed"]}
    for peer in arguments.peers:
        python = str(cache / PEERS[peer] / "bin" / "python")
        commands[peer] = [python, str(here / "bench_peers.py"), "--peer", peer]
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for number in range(arguments.rounds):
        for name, command in commands.items():
            results[name].append(measured(command))
            figures = {f: round(results[name][-1][f], 1) for f in FIGURES}
            print(f"round {number + 1}: {name} {figures}", file=sys.stderr, flush=True)
    ours = results["sinkjax"]
    print("| | decode, tokens/s | sinkjax is × faster | prefill, tokens/s | sinkjax is × faster |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        version = runs[0].get("version") or f"jax {runs[0]['jax']}"
        cells = [f"{name} ({version})"]
        for figure in FIGURES:
            ratio = statistics.median(
                a[figure] / b[figure] for a, b in zip(ours, runs, strict=True)
            )
            cells += [f"{statistics.median(r[figure] for r in runs):.1f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
