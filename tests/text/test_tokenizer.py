import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from sinkjax.text.tokenizer import Tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def facts(tokenizer: Tokenizer) -> tuple[object, ...]:
    return (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_ids,
        tokenizer.add_bos,
        tokenizer.chat_template,
    )


def folder(directory: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    """Writes a Hugging Face folder with these JSON files beside tokenizer.json."""
    tokenizer.save(directory)
    (directory / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory / "tokenizer.json"


# From GGUF metadata


@pytest.mark.parametrize("split", ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"])
def test_byte_level_ids_are_those_of_llama_cpp(smollm2_gguf_metadata, reference, split):
    metadata = {**smollm2_gguf_metadata, "tokenizer.ggml.pre": split}
    tokenizer = Tokenizer.from_gguf(metadata)
    for entry in reference["texts"]:
        if split == "qwen2" and "\u0301" in entry["text"]:
            continue  # Qwen2's own tokenizer composes characters first; llama.cpp does not
        assert tokenizer.encode(entry["text"], add_bos=False) == entry["llama.cpp"][split]


def test_smollm2_ids_and_texts_are_those_of_transformers(smollm2, reference):
    differ = []
    for entry in reference["texts"]:
        if smollm2.encode(entry["text"]) != entry["transformers"]:
            differ.append(entry["text"])
        assert smollm2.decode(entry["transformers"]) == entry["decoded"]
    # Reading a GGUF, transformers does not set digits apart before BPE, as SmolLM's own
    # tokenizer (and llama.cpp, above) does; it shows after runs of spaces and on "½".
    assert differ == [text for text in differ if "   1" in text or "½" in text]
    assert len(differ) == 2


def test_smollm2_facts(smollm2):
    assert facts(smollm2)[:4] == (49152, 1, (2,), False)
    assert smollm2.chat_template.startswith("{% for message in messages %}")


def test_sentencepiece_ids_and_texts_are_those_of_sentencepiece(sentencepiece, reference):
    for entry in reference["sentencepiece"]["texts"]:
        assert sentencepiece.encode(entry["text"], add_bos=False) == entry["ids"]
        assert sentencepiece.encode(entry["text"]) == [sentencepiece.bos_id, *entry["ids"]]
        assert sentencepiece.decode(entry["ids"]) == entry["decoded"] == entry["text"]


def test_sentencepiece_without_space_prefix(reference):
    metadata = reference["sentencepiece"]["metadata"]
    tokenizer = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode(" the cat", add_bos=False)
    assert ids == tokenizer.encode("▁the▁cat", add_bos=False)
    assert tokenizer.decode(ids) == " the cat"
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_llama3_takes_whole_words_and_begins_with_bos(byte_level_metadata):
    metadata = {**byte_level_metadata, "tokenizer.ggml.merges": []}
    hello = metadata["tokenizer.ggml.tokens"].index("hello")
    plain = Tokenizer.from_gguf(metadata)
    llama3 = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"})
    assert plain.decode(plain.encode("hello")) == "hello"
    assert len(plain.encode("hello")) == 5
    assert llama3.encode("hello") == [llama3.bos_id, hello]


def test_gguf_special_tokens(byte_level, byte_level_metadata):
    start, end, tool = range(byte_level.vocab_size - 3, byte_level.vocab_size)
    ids = byte_level.encode("<|im_start|>h«tool»<|im_end|>")
    assert [ids[0], *ids[2:]] == [start, tool, end]
    assert byte_level.decode(ids) == "h«tool»"
    assert byte_level.decode(ids, skip_special=False) == "<|im_start|>h«tool»<|im_end|>"
    more = Tokenizer.from_gguf({**byte_level_metadata, "tokenizer.ggml.eot_token_id": tool})
    assert more.eos_ids == (end, tool)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "t5", "'t5'.*'gpt2'.*'llama'"),
        ("tokenizer.ggml.model", None, "no 'tokenizer.ggml.model'"),
        ("tokenizer.ggml.merges", None, "no 'tokenizer.ggml.merges'"),
        ("tokenizer.ggml.merges", ["h e l"], "'h e l'; expected 'left right'"),
        ("tokenizer.ggml.merges", ["he"], "'he'; expected 'left right'"),
        (
            "tokenizer.ggml.pre",
            "viking",
            "'viking'; supported are bloom, default, falcon, gpt-2, .*smollm",
        ),
        ("tokenizer.ggml.token_type", [1], "1 entries for 266 tokens"),
        ("tokenizer.ggml.bos_token_id", 266, "266 is not in the vocabulary of size 266"),
        ("tokenizer.ggml.add_bos_token", True, None),
    ],
)
def test_gguf_metadata_that_does_not_do(byte_level_metadata, key, value, message):
    metadata = {**byte_level_metadata, key: value}
    if message is None:
        metadata["tokenizer.ggml.bos_token_id"] = None
        message = "no bos_id"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(metadata)


def test_sentencepiece_scores_for_each_token(reference):
    metadata = {**reference["sentencepiece"]["metadata"], "tokenizer.ggml.scores": [0.0]}
    with pytest.raises(ValueError, match="1 entries for 380 tokens"):
        Tokenizer.from_gguf(metadata)


# Encoding and decoding


def test_add_bos(tokenizer):
    ids = tokenizer.encode("hello", add_bos=False)
    assert tokenizer.encode("hello", add_bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_bos=tokenizer.add_bos)
    assert tokenizer.decode(tokenizer.encode("hello", add_bos=True)) == "hello"


def test_add_bos_without_one(byte_level_metadata):
    tokenizer = Tokenizer.from_gguf({**byte_level_metadata, "tokenizer.ggml.bos_token_id": None})
    assert tokenizer.bos_id is None
    with pytest.raises(ValueError, match="no bos_id"):
        tokenizer.encode("hello", add_bos=True)


@pytest.mark.parametrize("wrong", [-1, 1_000_000])
def test_decode_names_an_id_that_is_out_of_range(tokenizer, wrong):
    with pytest.raises(ValueError, match=rf"id {wrong} .* size {tokenizer.vocab_size}"):
        tokenizer.decode([tokenizer.eos_ids[0], wrong])


def test_decode_replaces_what_is_not_utf8(byte_level):
    ids = byte_level.encode("é!")
    assert byte_level.decode(ids) == "é!"
    assert byte_level.decode([ids[0], ids[2], ids[1]]) == "\ufffd!\ufffd"


# Hugging Face folders


def test_save_and_read_back(tokenizer, tmp_path):
    tokenizer = Tokenizer(
        tokenizer._backend,
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
        add_bos=tokenizer.add_bos,
        chat_template=CHATML,
    )
    tokenizer.save(tmp_path / "new")
    back = Tokenizer.from_file(tmp_path / "new" / "tokenizer.json")
    assert facts(back) == facts(tokenizer)
    text = "  hello «tool» 日本 12\n<|im_end|></s>"
    assert back.encode(text) == tokenizer.encode(text)
    assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    saved = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert saved == ["tokenizer.json", "tokenizer_config.json"]


def test_save_keeps_several_ends_and_no_bos(byte_level, tmp_path):
    tokenizer = Tokenizer.from_file(
        folder(tmp_path / "a", byte_level, generation_config={"eos_token_id": [265, 264, 263]}),
        config={"bos_token": None, "eos_token": "<|im_end|>"},
    )
    assert tokenizer.eos_ids == (264, 265, 263)
    tokenizer.save(tmp_path / "b")
    (tmp_path / "b" / "generation_config.json").write_text('{"bos_token_id": 7}')
    assert facts(Tokenizer.from_file(tmp_path / "b" / "tokenizer.json")) == facts(tokenizer)


def test_other_readers_see_the_bos_of_a_saved_tokenizer(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("the cat").ids == sentencepiece.encode("the cat")
    # and so do we, from the post-processor alone
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").add_bos


def test_files_beside_tokenizer_json(byte_level, tmp_path):
    path = folder(
        tmp_path,
        byte_level,
        special_tokens_map={"bos_token": "«tool»", "eos_token": {"content": "<|im_end|>"}},
        tokenizer_config={
            "bos_token": {"content": "<|im_start|>"},
            "chat_template": [
                {"name": "tool_use", "template": "T"},
                {"name": "default", "template": "D"},
            ],
        },
        generation_config={"eos_token_id": 265, "bos_token_id": 265},
    )
    assert facts(Tokenizer.from_file(path)) == (266, 263, (264, 265), False, "D")
    (tmp_path / "chat_template.jinja").write_text("J")
    read = Tokenizer.from_file(path, config={"add_bos_token": True, "eos_token": "hello"})
    hello = byte_level.encode("hello")[0]
    assert facts(read) == (266, 263, (hello, 265), True, "J")


def test_tokenizer_json_alone(byte_level, tmp_path):
    read = Tokenizer.from_file(folder(tmp_path, byte_level))
    assert facts(read) == (266, None, (), False, None)
    assert read.encode("hello 12") == byte_level.encode("hello 12")


def test_files_that_do_not_do(byte_level, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*expected .*tokenizer.json"):
        Tokenizer.from_file(tmp_path)
    path = folder(tmp_path, byte_level, tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(ValueError, match="eos_token is '</s>', which is not in"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Strip(" ", 1, 0)])
def test_a_decoder_that_is_not_supported(decoder):
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match="decoder is .*supported are ByteLevel"):
        Tokenizer(backend)
