"""Times the attention kernels on an NVIDIA GPU: against what the chip can do, and against others.

    python scripts/bench_gpu.py --out bench_gpu.json [--torch_python /path/to/python]

Takes some minutes. First the two ceilings, bytes copied and bfloat16 products a second; then every
kernel at real shapes: first that it is right, on fresh random inputs against float32, then its time
against its ceiling, and beside it what does the same in XLA (backend "reference" or "xla"), in
cuDNN (`jax.nn.dot_product_attention`, where it can express the mask), and in PyTorch
(`scripts/bench_gpu_torch.py`, run by `--torch_python`). Times are of a loop inside one program, so
that no launch from Python counts, over inputs that no cache holds; the median of `--repeats`.

On a machine without a GPU: `--small --backend reference` tries every part in small, and measures
nothing worth a number.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array, lax

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.ring import Ring, quantised
from pallas_kernels.ring_decode import ring_decode
from pallas_kernels.sink_attention import sink_attention

_OUT = flags.DEFINE_string("out", "", "where to write the figures, as JSON")
_BACKEND = flags.DEFINE_string("backend", "gpu", "the backend of the kernels that is measured")
_SMALL = flags.DEFINE_bool("small", False, "small shapes: try the script, not the chip")
_ONLY = flags.DEFINE_list("only", [], "parts to run; all, if none is named")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timings of which the median counts", lower_bound=1)
_BUDGET = flags.DEFINE_float("budget", 450, "seconds after which what is left is left out")
_TORCH = flags.DEFINE_string("torch_python", "python3", "an interpreter that has PyTorch")
_SEED = flags.DEFINE_integer("seed", -1, "of the inputs; -1: a fresh one")

SINKS = 4


class Shapes(NamedTuple):
    """What is measured. `loop`: seconds of work that one timing should take."""

    copy: int
    matrix: int
    loop: float
    batches: tuple[int, ...]
    ring: int
    heads: tuple[int, int]
    head_dim: int
    tokens: int
    checked_tokens: int
    block: int
    listed: int
    flush: int


REAL = Shapes(1 << 31, 8192, 0.05, (1, 16, 64), 4096, (32, 8), 128, 32768, 2048, 128, 32, 1 << 28)
SMALL = Shapes(1 << 16, 64, 0.0, (1, 2), 64, (4, 2), 64, 256, 128, 32, 3, 1 << 10)


class Bench:
    """Rows of the table, and the ceilings that they are held against."""

    def __init__(self, shapes: Shapes, backend: str, deadline: float, rng: np.random.Generator):
        self.shapes, self.backend, self.deadline, self.rng = shapes, backend, deadline, rng
        self.ceilings: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def normal(self, *shape: int, dtype: Any = jnp.bfloat16) -> Array:
        key = jax.random.key(int(self.rng.integers(2**31)))
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    def row(self, what: str, who: str, unit: str, work: float, run: Callable[[], tuple]) -> None:
        """One line: `run` gives the seconds of one call, and the error against float32 or None.

        Args:
            unit: of the ceiling, "bytes" or "operations"; `work` is how many of them a call needs.
        """
        entry: dict[str, Any] = {"what": what, "who": who}
        if time.monotonic() > self.deadline:
            entry["problem"] = "left out: the time is up"
        else:
            try:
                seconds, error = run()
                entry |= {"seconds": seconds, "error": error, unit: work, "rate": work / seconds}
                if unit in self.ceilings:
                    entry["of_ceiling"] = work / seconds / self.ceilings[unit]
            except Exception as problem:  # one that fails must not take the others with it
                entry["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        self.add(entry)

    def add(self, entry: dict[str, Any]) -> None:
        self.rows.append(entry)
        print(line(entry), flush=True)

    def seconds(self, step: Callable, state: Any) -> float:
        """The median time of `state = step(state)`, in a loop of one program, in place."""
        state = jax.tree.map(jnp.copy, state)

        def times(count: int, repeats: int, state: Any) -> tuple[list[float], Any]:
            def loop(state):
                return lax.fori_loop(0, count, lambda _, s: step(s), state)

            run = jax.jit(loop, donate_argnums=0)
            state = jax.block_until_ready(run(state))  # compiles, and warms up
            taken = []
            for _ in range(repeats):
                start = time.perf_counter()
                state = jax.block_until_ready(run(state))
                taken.append((time.perf_counter() - start) / count)
            return taken, state

        (once,), state = times(2, 1, state)
        count = max(2, min(2000, round(self.shapes.loop / once)))
        return statistics.median(times(count, _REPEATS.value, state)[0])


def line(entry: dict[str, Any]) -> str:
    cells = [entry["what"], entry["who"]]
    if "problem" in entry:
        return f"| {' | '.join(cells)} | {entry['problem']} | | | |"
    rate = f"{entry['rate'] / 1e12:.2f} T{'B' if 'bytes' in entry else 'FLOP'}/s"
    share = f"{entry['of_ceiling']:.0%}" if "of_ceiling" in entry else ""
    error = "" if entry["error"] is None else f"{entry['error']:.1e}"
    return f"| {' | '.join([*cells, f'{entry["seconds"] * 1e3:.3f}', rate, share, error])} |"


def distance(got: Array, want: Array) -> float:
    """‖got − want‖ / ‖want‖; infinite where anything is not a number."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    return error if np.isfinite(error) else float("inf")


def checked(error: float, most: float) -> float:
    if error > most:
        raise AssertionError(f"wrong: off by {error:.1e} of the norm, expected at most {most:.0e}")
    return error


def ceilings(bench: Bench) -> None:
    x = bench.normal(bench.shapes.copy // 2)
    moved = 2.0 * x.nbytes  # read and written

    def copy() -> tuple:
        return bench.seconds(lambda x: x + jnp.bfloat16(1), x), None

    n = bench.shapes.matrix
    b = bench.normal(n, n) / n**0.5

    def product() -> tuple:
        a = bench.normal(n, n)
        return bench.seconds(lambda a: jnp.dot(a, b), a), None

    bench.row("copy", "XLA", "bytes", moved, copy)
    bench.row("bfloat16 product", "XLA", "operations", 2.0 * n**3, product)
    for unit, entry in zip(("bytes", "operations"), bench.rows[-2:], strict=True):
        if "rate" in entry:
            bench.ceilings[unit] = entry["rate"]


def decode(bench: Bench) -> None:
    """One new token a row over a full ring; the ceiling is the reading of the ring."""
    for batch in bench.shapes.batches:
        for dtype in ("bfloat16", "int8", "int4"):
            decode_one(bench, batch, dtype)


def decode_one(bench: Bench, B: int, dtype: str) -> None:
    shapes = bench.shapes
    (H, Hkv), D, C = shapes.heads, shapes.head_dim, shapes.ring
    (k, k_scale), (v, v_scale) = (
        quantised(bench.normal(B, Hkv, C, D, dtype=jnp.float32), dtype) for _ in range(2)
    )
    ring = Ring(k, v, k_scale, v_scale)
    size = 2 * k.size * {"bfloat16": 16, "int8": 8, "int4": 4}[dtype] / 8
    if k_scale is not None:
        size += 2 * k_scale.nbytes
    layers = max(1, round(shapes.flush / size))  # so many that no cache holds their rings
    q, new_k, new_v = (bench.normal(B, 1, heads, D) for heads in (H, Hkv, Hkv))
    ticks = jnp.full((B,), 3 * C, jnp.int32)

    def attend(q: Array, ring: Ring, backend: str) -> tuple[Array, Ring]:
        return ring_decode(
            q, new_k, new_v, ring, ticks, sinks=SINKS, window=C - SINKS, backend=backend
        )

    def ours(backend: str) -> tuple:
        want, after = jax.jit(lambda *x: attend(*x, "reference"))(q.astype(jnp.float32), ring)
        got, written = jax.jit(lambda *x: attend(*x, backend))(q, ring)
        error = checked(distance(got, want), 1e-2)
        if not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, written, after))):
            raise AssertionError("wrong: the ring after is not the reference's")

        def step(state):
            q, rings = state
            after = []
            for one in rings:
                q, one = attend(q, one, backend)
                after.append(one)
            return q, tuple(after)

        return bench.seconds(step, (q, (ring,) * layers)) / layers, error

    def library(implementation: str) -> tuple:
        kv = tuple(x.swapaxes(1, 2) for x in ring[:2])

        def step(state):
            q, pairs = state
            for k, v in pairs:
                q = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
            return q, pairs

        return bench.seconds(step, (q, (kv,) * layers)) / layers, None

    what = f"ring_decode {dtype} batch {B}"
    for who in dict.fromkeys((bench.backend, "reference")):
        bench.row(what, who, "bytes", size, functools.partial(ours, who))
    if dtype == "bfloat16":
        for who in ("xla", "cudnn"):
            bench.row(what, f"{who}, no write", "bytes", size, functools.partial(library, who))


def fed(x: Array, result: Array) -> Array:
    """x `[B, T, H, D]`, with the result's last token: the next round must wait for it, and reads
    what is as random as before."""
    return lax.dynamic_update_slice_in_dim(x, result[:, -1:], x.shape[1] - 1, axis=1)


def dense(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Attention in float32: q `[B, T, H, D]`, seen `[T, K]`."""
    with jax.default_matmul_precision("highest"):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        B, T, H, D = q.shape
        grouped = q.reshape(B, T, k.shape[2], -1, D)
        scores = jnp.einsum("btkgd,bckd->bkgtc", grouped, k) * D**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bkgtc,bckd->btkgd", weights, v).reshape(q.shape)


def sink_window(rows: Array, keys: int, window: int) -> Array:
    k = jnp.arange(keys)
    back = rows[:, None] - k
    return (back >= 0) & ((k < SINKS) | (back < window))


def prefill(bench: Bench) -> None:
    """Sinks and a window over a long prompt, forward, and forward with backward."""
    shapes = bench.shapes
    (H, Hkv), D, T, window = shapes.heads, shapes.head_dim, shapes.tokens, shapes.ring - SINKS
    pairs = sum(min(t + 1, SINKS + window) for t in range(T))
    q, k, v = bench.normal(1, T, H, D), bench.normal(1, T, Hkv, D), bench.normal(1, T, Hkv, D)
    rows = jnp.asarray(np.sort(bench.rng.choice(T, 64, replace=False)))
    want = jax.jit(dense)(q[:, rows], k, v, sink_window(rows, T, window))
    # Gradients are checked on fewer tokens, where float32 and all pairs fit.
    few = shapes.checked_tokens
    short = tuple(bench.normal(1, few, h, D) for h in (H, Hkv, Hkv, H))
    narrow = max(1, few // 4)

    def gradients(f: Callable) -> Callable:
        def run(q, k, v, dout):
            return jax.vjp(f, q, k, v)[1](dout)

        return run

    def true(q, k, v):
        return dense(q, k, v, sink_window(jnp.arange(few), few, narrow))

    exact = jax.jit(gradients(true))(*(x.astype(jnp.float32) for x in short))

    def measure(who: str, f: Callable[..., Array], *, right: bool = True) -> None:
        def forward() -> tuple:
            error = None
            if right:
                error = checked(
                    distance(jax.jit(lambda *x: f(*x, window))(q, k, v)[:, rows], want), 1e-2
                )
            return bench.seconds(lambda q: fed(q, f(q, k, v, window)), q), error

        def both() -> tuple:
            error = None
            if right:
                got = jax.jit(gradients(lambda *x: f(*x, narrow)))(*short)
                error = checked(max(distance(a, b) for a, b in zip(got, exact, strict=True)), 2e-2)

            def step(state):
                q, k, v = state
                return tuple(map(fed, state, gradients(lambda *x: f(*x, window))(q, k, v, q)))

            return bench.seconds(step, (q, k, v)), error

        work = 4.0 * D * H * pairs
        bench.row(f"sink_attention {T}, forward", who, "operations", work, forward)
        bench.row(f"sink_attention {T}, with backward", who, "operations", 3.5 * work, both)

    def ours(backend: str) -> Callable:
        return lambda q, k, v, window: sink_attention(
            q, k, v, sinks=SINKS, window=window, backend=backend
        )

    def cudnn(q, k, v, window):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=(SINKS + window - 1, 0),
            implementation="cudnn",
        )

    measure(bench.backend, ours(bench.backend))
    if bench.backend != "xla":
        measure("xla", ours("xla"))
    measure("cudnn, a window alone", cudnn, right=False)


def sparse(bench: Bench) -> None:
    """LServe's prefill: of each block of queries the first key block, the four nearest, and others
    as chosen (here at random, by KV head) up to a budget."""
    shapes = bench.shapes
    (H, Hkv), D, T = shapes.heads, shapes.head_dim, shapes.tokens
    block, most = shapes.block, shapes.listed
    count = T // block
    blocks = np.full((1, Hkv, count, most), -1, np.int32)
    for h in range(Hkv):
        for i in range(count):
            near = set(range(max(0, i - 3), i + 1)) | {0}
            rest = [j for j in range(i) if j not in near]
            chosen = bench.rng.permutation(rest)[: max(0, most - len(near))]
            listed = sorted(near)[-most:] + [int(j) for j in chosen]
            blocks[0, h, i, : len(listed)] = listed
    pairs = 0
    for i in range(count):
        own = (blocks[0, :, i] == i).any(axis=1)
        whole = (blocks[0, :, i] >= 0).sum(axis=1) - own
        pairs += int((whole * block * block + own * block * (block + 1) // 2).sum())
    work = 4.0 * D * (H // Hkv) * pairs
    q, k, v = bench.normal(1, T, H, D), bench.normal(1, T, Hkv, D), bench.normal(1, T, Hkv, D)
    listed = jnp.asarray(blocks)

    def run(backend: str) -> tuple:
        def f(q):
            return block_sparse_attention(
                q, k, v, listed, block_sizes=(block, block), backend=backend
            )

        got, errors = jax.jit(f)(q), []
        for i in {int(i) for i in bench.rng.choice(count, 2)}:
            rows = jnp.arange(i * block, (i + 1) * block)
            for h in range(Hkv):
                heads = slice(h * H // Hkv, (h + 1) * H // Hkv)
                may = (jnp.arange(count) == listed[0, h, i][:, None]).any(axis=0)
                seen = jnp.repeat(may, block) & (jnp.arange(T) <= rows[:, None])
                one = k[:, :, h : h + 1], v[:, :, h : h + 1]
                errors.append(distance(got[:, rows, heads], dense(q[:, rows, heads], *one, seen)))
        return bench.seconds(lambda q: fed(q, f(q)), q), checked(max(errors), 1e-2)

    what = f"block_sparse {T}, {most} of {count}"
    for who in dict.fromkeys((bench.backend, "xla")):
        bench.row(what, who, "operations", work, functools.partial(run, who))


def others(bench: Bench) -> None:
    """PyTorch's, from another interpreter and another process."""
    script = pathlib.Path(__file__).with_name("bench_gpu_torch.py")
    python = shutil.which(_TORCH.value)
    left = bench.deadline - time.monotonic()
    arguments = dict(bench.shapes._asdict(), sinks=SINKS, repeats=_REPEATS.value, budget=left)
    problem, lines = "", []
    if python is None:
        problem = f"absent: no {_TORCH.value}"
    elif left < 20:
        problem = "left out: the time is up"
    else:
        try:
            done = subprocess.run(
                [python, str(script), json.dumps(arguments)],
                capture_output=True,
                text=True,
                timeout=left + 30,
            )
            lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
            if done.returncode:
                problem = "absent: " + (done.stderr.strip().splitlines() or ["?"])[-1][:200]
        except subprocess.TimeoutExpired as late:
            problem = f"stopped after {late.timeout:.0f} s"
    for entry in lines:
        for unit in ("bytes", "operations"):
            if unit in entry and unit in bench.ceilings:
                entry["of_ceiling"] = entry["rate"] / bench.ceilings[unit]
        bench.add(entry)
    if problem:
        bench.add({"what": "all", "who": "PyTorch", "problem": problem})


PARTS = {
    "ceilings": ceilings,
    "ring_decode": decode,
    "sink_attention": prefill,
    "block_sparse": sparse,
    "torch": others,
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are expected, got {argv[1:]}")
    for name in _ONLY.value:
        if name not in PARTS:
            raise app.UsageError(f"--only: {name!r} is none of {', '.join(PARTS)}")
    here = jax.default_backend()
    if here != "gpu" and not _SMALL.value:
        raise SystemExit(
            f"bench_gpu: there is no NVIDIA GPU here (jax runs on {here!r}). "
            "To try the script alone: --small --backend reference"
        )
    seed = _SEED.value if _SEED.value >= 0 else time.time_ns() % 2**31
    deadline = time.monotonic() + _BUDGET.value
    shapes = SMALL if _SMALL.value else REAL
    bench = Bench(shapes, _BACKEND.value, deadline, np.random.default_rng(seed))
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, seed {seed}\n")
    print(
        "| what | who | ms | rate | of the ceiling | error |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, part in PARTS.items():
        if not _ONLY.value or name in _ONLY.value:
            part(bench)
    if _OUT.value:
        figures = {"device": device, "jax": jax.__version__, "seed": seed, "small": _SMALL.value}
        figures |= {"ceilings": bench.ceilings, "rows": bench.rows}
        pathlib.Path(_OUT.value).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
