"""PyTorch's part of `bench_gpu.py`: the same shapes, by SDPA and by flex_attention.

    python scripts/bench_gpu_torch.py '{"heads": [32, 8], ...}'

Prints a JSON line for each figure. Needs PyTorch alone, so that any interpreter that has it can run
it. Times are CUDA events around single calls, launches queued ahead; the median.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable


def main() -> None:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU")
    given = json.loads(sys.argv[1])
    deadline = time.monotonic() + given["budget"]
    (H, Hkv), D, C, S = given["heads"], given["head_dim"], given["ring"], given["sinks"]
    T, window, repeats = given["tokens"], given["ring"] - given["sinks"], given["repeats"]

    def normal(*shape: int, gradient: bool = False) -> torch.Tensor:
        x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(gradient)

    def seconds(call: Callable[[int], object]) -> float:
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        events = []
        # A pause on the device, so that launches from Python queue up behind it.
        torch.cuda._sleep(20_000_000)
        for i in range(4 * repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(i)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in events)

    def row(what: str, who: str, unit: str, work: float, run: Callable[[], tuple]) -> None:
        entry: dict = {"what": what, "who": f"PyTorch {torch.__version__} {who}"}
        if time.monotonic() > deadline:
            entry["problem"] = "left out: the time is up"
        else:
            try:
                taken, error = run()
                entry |= {"seconds": taken, "error": error, unit: work, "rate": work / taken}
            except Exception as problem:  # one that fails must not take the others with it
                entry["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        print(json.dumps(entry), flush=True)

    def seen(q: torch.Tensor, k: torch.Tensor, width: int) -> torch.Tensor:
        return (k <= q) & ((k < S) | (q - k < width))

    def exact(q, k, v, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the result, in float64."""
        k, v = (x.double().repeat_interleave(H // Hkv, dim=1) for x in (k, v))
        scores = q[:, :, rows].double() @ k.mT * D**-0.5
        hidden = ~seen(rows[:, None], torch.arange(k.shape[2], device="cuda"), window)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    def distance(got: torch.Tensor, want: torch.Tensor) -> float:
        return ((got.double() - want).norm() / want.norm()).item()

    compiled = torch.compile(flex_attention, dynamic=False)

    for B in given["batches"]:
        size = 2 * B * Hkv * C * D * 2
        layers = max(2, round(given["flush"] / size))
        q = normal(B, H, 1, D)
        kv = [(normal(B, Hkv, C, D), normal(B, Hkv, C, D)) for _ in range(layers)]

        def decode(attend: Callable, q=q, kv=kv, layers=layers) -> tuple:
            def call(i: int) -> object:
                return attend(q, *kv[i % layers], enable_gqa=True)

            k, v = (x.double().repeat_interleave(H // Hkv, dim=1) for x in kv[0])
            want = (q.double() @ k.mT * D**-0.5).softmax(-1) @ v
            return seconds(call), distance(call(0), want)

        what = f"ring_decode bfloat16 batch {B}"
        for who, attend in {"SDPA": sdpa, "flex_attention": compiled}.items():
            row(what, f"{who}, no write", "bytes", size, lambda a=attend, d=decode: d(a))

    q, k, v = (normal(1, h, T, D, gradient=True) for h in (H, Hkv, Hkv))
    dout = normal(1, H, T, D)
    work = 4.0 * D * H * sum(min(t + 1, S + window) for t in range(T))
    rows = torch.randperm(T, device="cuda")[:16]

    def flex() -> Callable[[], torch.Tensor]:
        def rule(b, h, q, k):
            return seen(q, k, window)

        blocks = create_block_mask(rule, None, None, T, T, device="cuda")
        return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True)

    def masked() -> Callable[[], torch.Tensor]:
        at = torch.arange(T, device="cuda")
        mask = seen(at[:, None], at, window)
        return lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    for who, make in {"flex_attention": flex, "SDPA with a mask": masked}.items():

        def forward(make=make) -> tuple:
            call = make()
            with torch.no_grad():
                error = distance(call()[:, :, rows], exact(q, k, v, rows))
                return seconds(lambda _: call()), error

        def both(make=make) -> tuple:
            call = make()
            return seconds(lambda _: torch.autograd.grad(call(), (q, k, v), dout)), None

        row(f"sink_attention {T}, forward", who, "operations", work, forward)
        row(f"sink_attention {T}, with backward", who, "operations", 3.5 * work, both)


if __name__ == "__main__":
    main()
