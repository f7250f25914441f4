import gguf
import numpy as np
import pytest

from sinkjax.checkpoints import open_checkpoint
from sinkjax.checkpoints.gguf import GGUFFile
from sinkjax.models import RopeScaling, families

Q = gguf.GGMLQuantizationType
HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(x, heads):
    """What llama.cpp does to q and k: the halves of each head interleaved."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def write(path, hf, tensors, *, kind=Q.F32, permuted=None, extra=(), factors=None):
    """A GGUF file from Hugging Face tensors; returns the tensors as quantising left them."""
    architecture = hf["model_type"].replace("mistral", "llama")
    permuted = architecture == "llama" if permuted is None else permuted
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf.get("rope_theta", 10_000.0))
    for key, value in extra:
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    kept = {}
    for name, x in tensors.items():
        new = name
        for hf_name, gguf_name in HF_TO_GGUF.items():
            new = new.replace(f"{hf_name}.", f"{gguf_name}.")
        heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
        part = name.split(".")[-2]
        stored = permute(x, heads[part]) if permuted and part in heads else x
        this = kind if x.ndim == 2 else Q.F32
        data = gguf.quantize(stored, this)
        writer.add_tensor(new, data, raw_dtype=this)
        left = gguf.dequantize(data, this)
        if permuted and part in heads:  # undone by an index, not by what is under test
            order = permute(np.arange(x.shape[0]), heads[part])
            undone = np.empty_like(left)
            undone[order] = left
            left = undone
        kept[name] = left
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


CASES = [
    {"model_type": "llama"},
    {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 500_000.0},
    {"model_type": "llama", "attention_bias": True},
    {"model_type": "qwen2", "num_key_value_heads": 1},
    {"model_type": "qwen3", "head_dim": 32},
]
KINDS = [Q.F16, Q.BF16, Q.Q4_0, Q.Q5_0, Q.Q5_1, Q.Q8_0]  # each once, two with every family
PAIRS = [(case, kind) for case in CASES for kind in (Q.F32, Q.Q4_1)]
PAIRS += [(CASES[0], kind) for kind in KINDS]


@pytest.mark.parametrize(
    ("case", "kind"),
    PAIRS,
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x.name,
)
def test_same_logits_as_safetensors(tmp_path, hf_folder, hf_tensors, logits, tiny, case, kind):
    hf = tiny | case
    path = tmp_path / "model.gguf"
    left = write(path, hf, hf_tensors(hf), kind=kind)
    loaded = open_checkpoint(str(path))
    expected = logits(open_checkpoint(str(hf_folder(tensors=left, **case))).model)
    assert loaded.name == "model" and loaded.tokenizer is None
    np.testing.assert_allclose(logits(loaded.model), expected, atol=1e-5 * np.abs(expected).max())


def test_a_wrong_permutation_shows(tmp_path, hf_folder, hf_tensors, logits, tiny):
    write(tmp_path / "model.gguf", tiny, hf_tensors(tiny), permuted=False)
    wrong = logits(open_checkpoint(str(tmp_path / "model.gguf")).model)
    right = logits(open_checkpoint(str(hf_folder())).model)
    assert np.abs(wrong - right).max() > 1e-2 * np.abs(right).max()


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K], ids=lambda k: k.name)
def test_k_quants(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60, so that no half-precision scale among them is NaN.
    raw = np.random.default_rng(0).integers(0, 60, (6, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    x = GGUFFile(tmp_path / "k.gguf")["x"]
    assert x.shape == (6, 2 * block) and x.dtype == np.float32
    np.testing.assert_array_equal(x, gguf.dequantize(raw, kind))


def test_metadata_is_what_the_package_reads(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for add, value in (
        (writer.add_uint8, 3), (writer.add_int8, -3), (writer.add_uint16, 999),
        (writer.add_int16, -999), (writer.add_uint32, 2**31), (writer.add_int32, -7),
        (writer.add_uint64, 2**40), (writer.add_int64, -(2**40)), (writer.add_float32, 0.5),
        (writer.add_float64, 0.1), (writer.add_bool, True), (writer.add_string, "Ġé▁"),
        (writer.add_array, ["a", "Ġb", ""]), (writer.add_array, [1, -2, 3]),
        (writer.add_array, [0.5, 1.5]), (writer.add_array, [True, False]),
    ):  # fmt: skip
        add(f"{add.__name__}.{type(value).__name__}.{value}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    expected = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert GGUFFile(tmp_path / "m.gguf").metadata == expected


def test_tokenizer_comes_with_it(tmp_path, hf_tensors, tiny):
    hf = tiny | {"vocab_size": 4}
    path = tmp_path / "model.gguf"
    writer_extra = [("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "gpt-2")]
    write(path, hf, hf_tensors(hf), extra=writer_extra)
    with pytest.raises(ValueError, match="tokenizer.ggml.tokens"):
        open_checkpoint(str(path))


def _llama3_factors(head_dim, base, factor, original):
    scaling = RopeScaling("llama3", factor, original)
    rotary = families.common.Rotary
    return rotary(head_dim, base).frequencies() / rotary(head_dim, base, scaling).frequencies()


def _metadata(**extra):
    own = {
        "block_count": 1, "context_length": 131072, "embedding_length": 2048,
        "feed_forward_length": 8192, "attention.head_count": 32, "rope.freq_base": 500000.0,
    }  # fmt: skip
    own |= extra
    return {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in own.items()}


SHAPES = {"token_embd.weight": (128256, 2048)}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(factor):
    factors = _llama3_factors(64, 500000.0, factor, 8192).astype(np.float32)
    config = families.config_from_gguf(_metadata(), SHAPES, factors)
    assert config.rope_scaling == RopeScaling("llama3", factor, 8192)


def test_no_llama3_scaling_where_all_factors_are_one():
    config = families.config_from_gguf(_metadata(), SHAPES, np.ones(32, np.float32))
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    "factors",
    [
        np.linspace(1, 4, 32),
        _llama3_factors(64, 500000.0, 8, 4096),
        np.full(32, np.nan),
        np.ones(3),
    ],
)
def test_other_factors_are_refused(factors):
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        families.config_from_gguf(_metadata(), SHAPES, factors)


def test_llama3_file_end_to_end(tmp_path, hf_folder, hf_tensors, logits, tiny):
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    hf = tiny | {"rope_scaling": rope}
    factors = _llama3_factors(16, 10_000.0, 8.0, 64)
    extra = [("llama.rope.scaling.original_context_length", 64)]
    write(tmp_path / "m.gguf", hf, hf_tensors(hf), factors=factors, extra=extra)
    expected = logits(open_checkpoint(str(hf_folder(rope_scaling=rope))).model)
    found = logits(open_checkpoint(str(tmp_path / "m.gguf")).model)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_linear_and_yarn():
    linear = _metadata(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert families.config_from_gguf(linear, SHAPES).rope_scaling.factor == 4.0
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32768}
    yarn = _metadata(**{f"rope.scaling.{k}": v for k, v in keys.items()})
    assert families.config_from_gguf(yarn, SHAPES).rope_scaling == RopeScaling("yarn", 4.0, 32768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "short_factors > 0"),
        ({"rope.scaling.type": "linear"}, "factor must be > 0"),
        ({"expert_count": 8}, "no 'expert_used_count'"),
        ({"rope.dimension_count": 33}, "even number of dimensions, .* got 33"),
        ({"attention.value_length": 32}, "attention.value_length 32 is not supported"),
        ({"attention.head_count": [32, 16]}, "one whole number for all layers"),
        ({"block_count": None}, "no 'block_count'"),
    ],
)
def test_unsupported(changes, message):
    with pytest.raises(ValueError, match=message):
        families.config_from_gguf(_metadata(**changes), SHAPES)


def test_unknown_architecture(tmp_path, hf_tensors, tiny):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match="m.gguf: .*'mamba' is not supported.*llama, qwen2, qwen3, "
    ):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_every_truncation_is_noticed(tmp_path, hf_tensors, tiny):
    path = tmp_path / "m.gguf"
    write(path, tiny, hf_tensors(tiny))
    data = path.read_bytes()
    tensors = GGUFFile(path).tensors
    end = max(t.start + t.size for t in tensors.values())
    begin = min(t.start for t in tensors.values())
    for kept in (0, 3, 4, 9, 20, 50, 200, begin - 33, begin, begin + 1, end - 1):
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match="m.gguf is (no GGUF|a corrupt or trunc|truncated)"):
            GGUFFile(path)


def test_noise_in_the_header_never_ends_in_another_error(tmp_path, hf_tensors, tiny):
    path = tmp_path / "m.gguf"
    write(path, tiny, hf_tensors(tiny))
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        noisy = bytearray(data)
        at = int(random.integers(4, 700))
        noisy[at : at + 4] = random.bytes(4)
        path.write_bytes(noisy)
        try:
            file = GGUFFile(path)
            shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
            families.config_from_gguf(file.metadata, shapes)
        except ValueError as error:
            assert str(error)


def test_nan_weights(tmp_path, hf_tensors, tiny):
    tensors = hf_tensors(tiny)
    tensors["model.norm.weight"][5] = np.inf
    write(tmp_path / "m.gguf", tiny, tensors)
    with pytest.raises(ValueError, match="not finite: norm"):
        open_checkpoint(str(tmp_path / "m.gguf"))
