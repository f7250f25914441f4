"""Measures what it takes of host memory to load a model onto a mesh.

    python scripts/measure_load.py --folder llama-3-8b

makes random safetensors of the shape of Llama-3-8B in the folder (bfloat16, 16 GB; once), and loads
them with `sinkjax.load(folder, dtype="bfloat16", mesh=...)` in as many processes as there are
devices, one device each, as on as many hosts. The device is a CPU, whose memory is that of the
host: so a process that has loaded holds its device's share, and what it held on the way above that
is what loading takes.

Measured in each process, above what it had before: the peak of anonymous memory (`RssAnon`, read
every 2 ms), which nothing but the process itself can free; and the peak of resident memory
(`VmHWM`), which has the pages of the mapped files too, that the system takes back as it likes.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

FLAGS = flags.FLAGS
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
LAYERS_A_FILE = 4


def random_bfloat16(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Numbers between 2⁻⁷ and 2⁻⁶ of either sign."""
    bits = random.integers(0, 2**16, shape, np.uint16)
    return (bits & 0x807F | 0x3C00).view(jnp.bfloat16)


def make(folder: Path, layers: int) -> None:
    """Writes the checkpoint: the embedding, the layers, and the head, in several files."""
    queries, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "self_attn.q_proj": (queries, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, queries),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCAB, HIDDEN)}]
    for first in range(0, layers, LAYERS_A_FILE):
        files.append(
            {
                f"model.layers.{i}.{name}.weight": shape
                for i in range(first, min(first + LAYERS_A_FILE, layers))
                for name, shape in layer.items()
            }
        )
    files.append({"lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)})

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    places = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        made = {tensor: random_bfloat16(shape, random) for tensor, shape in tensors.items()}
        save_file(made, folder / name)
        places |= dict.fromkeys(tensors, name)
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        hidden_act="silu",
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))  # last: now it is whole


def memory(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status says no {field}")


class Peak(threading.Thread):
    """The greatest anonymous memory while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, memory("RssAnon"))

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def load(folder: Path, address: str, devices: int, process: int) -> None:
    """One process: prints what it measured."""
    import jax

    import sinkjax as sj
    from sinkjax import mesh

    mesh.initialize(address, devices, process)
    made = sj.make_mesh(f"model={devices}")
    # What the first computation brings with it is no part of loading.
    jax.jit(lambda x: jnp.isfinite(x).all())(np.ones(4, jnp.bfloat16)).block_until_ready()
    before = {field: memory(field) for field in ("RssAnon", "VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM begin anew
    peak, start = Peak(), time.perf_counter()
    peak.start()
    lm = sj.load(folder, dtype="bfloat16", mesh=made)
    leaves = jax.tree.leaves(lm.model)
    jax.block_until_ready(leaves)
    seconds = time.perf_counter() - start
    most = peak.stop()
    result = dict(
        process=process,
        share=sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards),
        anonymous_peak=most - before["RssAnon"],
        anonymous_after=memory("RssAnon") - before["RssAnon"],
        resident_peak=memory("VmHWM") - before["VmRSS"],
        before=before["RssAnon"],
        seconds=round(seconds, 1),
    )
    print(json.dumps(result), flush=True)
    mesh.agree("the end", 0)


def main(argv: list[str]) -> None:
    folder = Path(FLAGS.folder)
    if FLAGS.process is not None:
        return load(folder, FLAGS.address, FLAGS.devices, FLAGS.process)
    if not (folder / "config.json").is_file():
        start = time.perf_counter()
        make(folder, FLAGS.layers)
        print(f"made {folder} in {time.perf_counter() - start:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    own = [f"--folder={folder}", f"--devices={FLAGS.devices}", f"--address={address}"]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *own, f"--process={i}"],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(FLAGS.devices)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a process failed: see above")
    tensor = VOCAB * HIDDEN * 2
    print(f"{size / 1e9:.2f} GB on disk, the largest tensor {tensor / 1e9:.2f} GB")
    print("GB: process, share, anonymous peak and after, resident peak, (peak − tensor) / share")
    for text in said:
        row = json.loads(text[text.index("{") :].splitlines()[0])
        figures = [row[n] for n in ("share", "anonymous_peak", "anonymous_after", "resident_peak")]
        ratio = (row["anonymous_peak"] - tensor) / row["share"]
        shown = "  ".join(f"{x / 1e9:6.3f}" for x in figures)
        print(f"{row['process']}  {shown}  {ratio:.3f}  in {row['seconds']} s")


if __name__ == "__main__":
    flags.DEFINE_string(
        "folder", None, "Of the checkpoint; made if it is not there.", required=True
    )
    flags.DEFINE_integer("layers", 32, "Of the checkpoint that is made; 32 is Llama-3-8B.", 1)
    flags.DEFINE_integer("devices", 4, "Over which it is spread, a process each.", 1)
    flags.DEFINE_integer("process", None, "Of a process that this script starts itself.")
    flags.DEFINE_string("address", None, "As well.")
    app.run(main)
