import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sinkjax.checkpoints import open_checkpoint
from sinkjax.checkpoints.safetensors import Tensors
from tests.processes import peak_memory, reset_peak_memory


def test_a_folder_opens(hf_folder, logits, tokenizer):
    folder = hf_folder()
    tokenizer.save(folder)
    loaded = open_checkpoint(str(folder))
    assert loaded.name == "tiny"
    assert loaded.config.family == "llama" and loaded.config is not None
    assert loaded.tokenizer.encode("abc") == [0, 1, 2]
    assert np.isfinite(logits(loaded.model)).all()


def test_shards_give_the_same_model(hf_folder, logits):
    whole, folder = hf_folder("whole"), hf_folder("sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(index.values()):
        save_file({n: x for n, x in tensors.items() if index[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model, other = (open_checkpoint(str(f)).model for f in (whole, folder))
    np.testing.assert_array_equal(logits(model), logits(other))

    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks shards.*model-1.safetensors"):
        open_checkpoint(str(folder))


def test_bfloat16_files_and_bfloat16_models(hf_folder, hf_tensors, tiny, logits):
    exact = {n: x.astype(jnp.bfloat16) for n, x in hf_tensors(tiny).items()}
    half = open_checkpoint(str(hf_folder("half", tensors=exact)))
    full = {n: x.astype(np.float32) for n, x in exact.items()}
    full = open_checkpoint(str(hf_folder("full", tensors=full)))
    np.testing.assert_array_equal(logits(half.model), logits(full.model))
    model = open_checkpoint(str(hf_folder("again")), dtype="bfloat16").model
    assert model.embed[...].dtype == jnp.bfloat16


def test_harmless_extras_are_dropped(hf_folder, hf_tensors, tiny):
    values = tiny | {"tie_word_embeddings": True}
    tensors = hf_tensors(values)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    open_checkpoint(str(hf_folder(tensors=tensors, tie_word_embeddings=True)))


def test_all_wrong_weights_are_listed_at_once(hf_folder, hf_tensors, tiny):
    tensors = hf_tensors(tiny)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.sinks"] = np.ones(4, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((95, 64), np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = np.nan
    with pytest.raises(ValueError) as error:
        open_checkpoint(str(hf_folder(tensors=tensors)))
    for line in (
        "missing: norm",
        "surplus: model.layers.0.self_attn.sinks",
        "surplus: blocks.0.attention.q_bias",
        "misshapen: blocks.1.mlp.up is (64, 95), expected (64, 96)",
        "not finite: blocks.1.mlp.down",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated(hf_folder, kept):
    file = hf_folder() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model.safetensors is corrupt or truncated"):
        open_checkpoint(str(file.parent))


def test_corrupt_header(hf_folder):
    file = hf_folder() / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is corrupt or truncated"):
        open_checkpoint(str(file.parent))


def test_no_weights(hf_folder):
    folder = hf_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_that_is_no_object(hf_folder, text):
    folder = hf_folder()
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        open_checkpoint(str(folder))


def test_unknown_family(hf_folder):
    folder = hf_folder()
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cannot open .*'mamba' is not supported.*llama, mistral"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("source", ["smollm3", "no/such/file.gguf", "/no/such/folder", ""])
def test_unknown_source(source):
    with pytest.raises(ValueError, match="expected a built-in name .smollm2-135m-instruct"):
        open_checkpoint(source)


def test_hub(hf_folder, monkeypatch):
    import huggingface_hub

    folder = hf_folder()
    asked = []

    def download(repo, *, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("some-org/tiny-1.5").name == "some-org/tiny-1.5"
    assert asked[0][0] == "some-org/tiny-1.5" and "config.json" in asked[0][1]


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub

    def download(repo, *, allow_patterns):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConnectionError, match="the hub cannot be reached for a model"):
        open_checkpoint("org/name")


def test_hub_without_the_model(monkeypatch):
    import huggingface_hub

    def download(repo, *, allow_patterns):
        error = huggingface_hub.errors.RepositoryNotFoundError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="the hub shows no model of this id"):
        open_checkpoint("org/name")


@pytest.fixture
def shards(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "a": random.normal(size=(300, 40)).astype(np.float32),
        "b": random.normal(size=(5, 6, 7)).astype(jnp.bfloat16),
        "c": random.integers(0, 256, (2, 3, 4, 16), np.uint8),
        "d": np.array(3.5, np.float16),
        "e": np.zeros((0, 4), np.float32),
        "f": random.normal(size=(4, 4)).astype(jnp.float8_e4m3fn),
    }
    for number, names in enumerate(("abc", "def")):
        save_file({n: tensors[n] for n in names}, tmp_path / f"{number}.safetensors")
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tensors


def test_tensors_by_name(shards):
    files, expected = shards
    tensors = Tensors(files)
    assert tensors.keys() == expected.keys() and len(tensors) == 6
    assert "a" in tensors and "g" not in tensors
    for name, x in expected.items():
        assert tensors.shapes[name] == x.shape
        assert tensors[name].dtype == x.dtype
        np.testing.assert_array_equal(tensors[name], x)
    with pytest.raises(KeyError):
        tensors["g"]


def test_tensors_are_read_when_they_are_used(shards, monkeypatch):
    files, expected = shards
    tensors = Tensors(files)
    opened = []
    monkeypatch.setattr(np, "memmap", lambda *args: opened.append(args) or np.zeros(1))
    assert list(tensors) == list(tensors.shapes) and "a" in tensors
    assert not opened
    tensors["a"]
    assert [args[0] for args in opened] == [files[0]]


def test_resident_memory_is_that_of_one_tensor(tmp_path):
    """Of 8 tensors of 32 MB, each read whole, and a share of it kept as a loader would."""
    tensors = {f"x{i}": np.ones((2048, 4096), np.float32) for i in range(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    del tensors
    mb = 2**20
    reset_peak_memory()
    before = peak_memory()
    kept = [x[:, :1024].copy() for x in Tensors([tmp_path / "x.safetensors"]).values()]
    assert sum(map(np.sum, kept)) == 8 * 2048 * 1024
    assert (
        peak_memory() - before < 8 * 8 * mb + 32 * mb + 8 * mb
    )  # shares, one tensor, and little else


def test_unknown_numbers(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(ValueError, match="x.safetensors: tensors of type F4 .x. are not read"):
        Tensors([file])
