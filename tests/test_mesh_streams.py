"""The same streams on every mesh: on one device, on eight, and on two hosts."""

import json
import math
import os

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import sinkjax as sj
from sinkjax import LanguageModel, Sampling, SinkRing, Stream
from sinkjax.checkpoints import orbax
from sinkjax.mesh import parse
from sinkjax.models import Config, Decoder
from sinkjax.streaming.snapshot import Recorder, resume
from tests.conftest import byte_tokenizer
from tests.models.conftest import DATA, quick_compiles  # noqa: F401
from tests.processes import free_port, run_processes, run_python

pytestmark = pytest.mark.usefixtures("quick_compiles")

MESHES = ["model=1", "model=2", "model=4,data=2", "data=8", "model=8"]
PROMPTS = ["Hi", "Hello", "Once upon a time", "A longer one, of chunks", "x", "yz", "…", "012345"]
TOKENS = 40  # the ring of 16 is full, and has gone round
FAMILIES = ["gpt_oss", "mpt"]  # experts, sink logits, a local layer; ALiBi
PARTS = [(0, 13), (13, 26), (26, 39), (39, 40)]


# What is done here on one device, and in other processes on several.


def new(lm: LanguageModel) -> Stream:
    stream = Stream(
        lm,
        cache=SinkRing(2, 14),
        sampling=Sampling(),
        seeds=range(len(PROMPTS)),
        ignore_eos=True,
        chunk=8,
    )
    stream.feed(PROMPTS)
    return stream


def said(stream: Stream, tokens: int = TOKENS) -> list[list]:
    """The text and the tokens of each row."""
    rows = zip(*stream.run(tokens), strict=True)
    return [["".join(o.text for o in row), [t for o in row for t in o.tokens]] for row in rows]


def save(stream: Stream, folder) -> None:
    Recorder(folder, stream, every=1000).close()


def text_of(lm: LanguageModel) -> list[int]:
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, 40).tolist()


def logits_of(lm: LanguageModel) -> np.ndarray:
    """`[40, V]`, of uneven chunks and one token, through three rounds of a ring."""

    def logits(model, caches, tokens):
        hidden, caches = model(tokens, caches)
        return caches, model.logits(hidden)

    step = lm.compiled(logits, lambda caches, rows: (caches, P(rows)))
    ids, caches, parts = text_of(lm), lm.init_caches(SinkRing(2, 11)), []
    for start, end in PARTS:
        caches, part = step(caches, np.asarray([ids[start:end]], np.int32))
        parts.append(np.asarray(part)[0])
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def folder(quick_compiles, tmp_path_factory):  # noqa: F811
    """A model of 8 heads and 2 KV heads, that reads and writes bytes."""
    config = Config(
        family="llama",
        vocab_size=256,  # divides over 8; without the tokenizer's special tokens
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=8,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_base=10_000.0,
        trained_context=64,
    )
    path = tmp_path_factory.mktemp("models") / "bytes"
    orbax.save_model(path, config, Decoder(config, rngs=nnx.Rngs(0)), byte_tokenizer())
    return path


@pytest.fixture(scope="module")
def one(folder) -> LanguageModel:
    return sj.load(folder)


@pytest.fixture(scope="module")
def expected(one, tmp_path_factory):
    """What the streams say on one device, before they are saved and after, and where that is."""
    stream, path = new(one), tmp_path_factory.mktemp("one") / "saved"
    first = said(stream)
    save(stream, path)
    return first, said(stream), path


ON_EIGHT = """
import json, logging, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
import numpy as np
import sinkjax as sj
from tests.test_mesh_streams import *

folder, saved, out = sys.argv[1:]
results, names = {}, []

class Compiled(logging.Handler):
    def emit(self, record):
        if found := re.match(r"Compiling (?:jit.)?(prefill|decode)", record.getMessage()):
            names.append(found[1])

jax.config.update("jax_log_compiles", True)
logging.getLogger("jax").addHandler(Compiled())
for spec in MESHES:
    lm = sj.load(folder, mesh=sj.make_mesh(spec))
    stream = new(lm)
    result = results[spec] = dict(first=said(stream))
    save(stream, f"{out}/{spec}")
    result["then"] = said(stream)
    resumed = resume(saved, lm)
    result["same place"] = all(
        x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(*(jax.tree.leaves(s.state) for s in (stream, resumed)))
    )
    result["devices"] = sorted({len(x.devices()) for x in jax.tree.leaves(resumed.state)})
    result["resumed"] = said(resumed)
    result["compiled"] = [names.count(name) for name in ("prefill", "decode")]
    names.clear()
    if spec != "model=4,data=2":
        continue
    step = lm.decode.lower(
        resumed.state, np.int32(1), steps=1, sampling=Sampling(), stop_tokens=()
    ).compile()
    result["aliased"] = step.memory_analysis().alias_size_in_bytes
    result["state"] = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(resumed.state))
for family in FAMILIES:
    lm = sj.load(DATA / family, mesh=sj.make_mesh("model=4"))
    results[family] = logits_of(lm).tolist()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def on_eight(folder, expected, tmp_path_factory):
    """What the script says of each mesh, and where it saved the streams."""
    out = tmp_path_factory.mktemp("eight")
    (ended,) = run_python([["-c", ON_EIGHT, folder, expected[2], out]], timeout=200)
    assert ended.code == 0, ended.err
    return json.loads(ended.out), out


@pytest.mark.parametrize("spec", MESHES)
def test_the_same_text_on_every_mesh(on_eight, expected, spec):
    result = on_eight[0][spec]
    assert len(expected[0]) == 8 and all(len(tokens) == TOKENS for _, tokens in expected[0])
    assert (result["first"], result["then"]) == expected[:2]
    assert result["compiled"] == [1, 1]


def test_the_cache_is_donated(on_eight):
    result = on_eight[0]["model=4,data=2"]
    assert result["aliased"] >= result["state"] > 0


@pytest.mark.parametrize("spec", MESHES)
def test_one_device_saves_and_eight_resume_and_the_other_way_round(on_eight, expected, one, spec):
    results, out = on_eight
    assert results[spec]["resumed"] == expected[1]
    assert results[spec]["same place"]
    assert results[spec]["devices"] == [math.prod(parse(spec).values())]
    resumed = resume(out / spec, one)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(resumed.state))
    assert said(resumed) == expected[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_four_devices(on_eight, family):
    """Sums over devices come in another order: some roundings of float32."""
    alone = logits_of(sj.load(DATA / family))
    np.testing.assert_allclose(np.asarray(on_eight[0][family]), alone, rtol=1e-5, atol=1e-5)


def test_two_hosts_decode_and_save_and_one_resumes(folder, expected, one, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    flags = ["--model", folder, "--mesh", "model=4,data=2", "--json", "--ignore_eos"]
    flags += ["--temperature=0", "--repetition_penalty=1", "--cache=ring:2+14"]
    flags += ["--prompts_file", tmp_path / "prompts", f"--max_tokens={TOKENS}"]
    flags += ["--save", tmp_path / "saved", "--save_every=30"]
    flags += ["--coordinator_address", f"localhost:{free_port()}", "--num_processes=2"]
    first, second = run_python(
        [["-m", "sinkjax.decode", *flags, f"--process_id={i}"] for i in range(2)], timeout=100
    )
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.err == ""
    rows = [["", []] for _ in PROMPTS]
    for event in events(first.out):
        if event["event"] == "text":
            rows[event["row"]][0] += event["text"]
            rows[event["row"]][1] += event["tokens"]
    assert rows == expected[0]
    assert events(second.out) == []
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert [name for name in saved if not name.startswith("text-")] == [
        f"at-{sum(map(len, map(str.encode, PROMPTS))) + 8 * n:015d}" for n in (30, TOKENS)
    ]
    assert (tmp_path / "saved" / "text-3.txt").read_text() == expected[0][3][0]
    assert said(resume(tmp_path / "saved", one)) == expected[1]


def events(out: str) -> list[dict]:
    """Gloo, over which CPUs talk, says on stdout when it has connected, from several threads."""
    gloo = ("[Gloo]", "peer ranks")
    return [json.loads(x) for x in out.splitlines() if x and not any(said in x for said in gloo)]


REFUSED = """
import os
import sinkjax as sj
from sinkjax import Sampling, SinkRing, Stream
from tests.test_mesh_streams import DATA
models, hosts, bytes_folder = sys.argv[1:]
four = sj.make_mesh("model=4")

def rows():
    lm = sj.load(bytes_folder, mesh=sj.make_mesh("model=2,data=2"))
    Stream(lm, cache=SinkRing(2, 14), sampling=Sampling(), seeds=range(3))

def shard():
    os.chdir(f"{hosts}/{int(not mesh.is_main())}")
    sj.load("model", mesh=four)

for wrong in (
    lambda: sj.load(DATA / "bloom", mesh=four),
    lambda: sj.make_mesh("model=8"),
    rows,
    shard,
):
    try:
        wrong()
    except ValueError as error:
        print(">", error)
"""


def test_what_two_hosts_refuse(folder, tmp_path):
    tensors = load_file(DATA / "llama3" / "model.safetensors")
    names = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for host in "01":
        model = tmp_path / host / "model"
        model.mkdir(parents=True)
        for file in "0.safetensors", "1.safetensors":
            save_file({n: tensors[n] for n, where in names.items() if where == file}, model / file)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        os.link(DATA / "llama3" / "config.json", model / "config.json")
    (tmp_path / "1" / "model" / "1.safetensors").unlink()
    for ended in run_processes(REFUSED, DATA, tmp_path, folder, devices=2, timeout=60):
        assert ended.code == 0, ended.err
        heads, devices, rows, shard = ended.out[ended.out.index("> ") :].split("> ")[1:]
        assert "does not divide over 4 devices of the mesh axis 'model': heads 6" in heads
        assert "needs 8 devices, and there are 4" in devices
        assert "3 rows do not divide over 2 devices of the mesh axis 'data'" in rows
        assert "failed on process 1" in shard and "lacks shards of its index: 1.safet" in shard
