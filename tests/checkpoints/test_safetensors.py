import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sinkjax.checkpoints import open_checkpoint


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
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = np.nan
    with pytest.raises(ValueError) as error:
        open_checkpoint(str(hf_folder(tensors=tensors)))
    for line in (
        "missing: norm",
        "surplus: model.layers.0.self_attn.sinks",
        "surplus: blocks.0.attention.q_bias",
        "misshapen: blocks.1.mlp.up is (64, 95), expected (64, 96)",
        "not finite: blocks.1.mlp.gate",
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
