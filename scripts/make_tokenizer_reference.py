"""Writes tests/data/tokenizer_reference.json: what other tokenizers say, for tests to compare.

    python scripts/make_tokenizer_reference.py SmolLM2-135M-Instruct.gguf

Needs, in an environment of its own: transformers, torch, gguf, sentencepiece, xllamacpp (of which
only llama.cpp's C function `llama_tokenize` is called). Their texts and ids are facts about
SmolLM2 and about a tiny SentencePiece model that is trained here on a few lines.
"""

import ctypes
import io
import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import sentencepiece
import transformers
import xllamacpp

OUT = Path(__file__).parents[1] / "tests" / "data" / "tokenizer_reference.json"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "It's what they'd've said: we're DON'T I'LL.",
    "12345 and 3.14159, 1,000,000; x2y3 ½ ² ٣",
    "a  b   c    d\t\te\n\n\nf \n g\r\n",
    "   leading and trailing   ",
    "in 2024   1999  7",
    "naïve café déjà vu Ångström",
    "cafe\u0301 as combining marks",
    "日本語のテキストと漢字、한국어, ไทย",
    "Привет мир! Γειά σου Κόσμε",
    "مرحبا بالعالم שלום",
    "👍🏽 family: 👨‍👩‍👧‍👦 flags: 🇫🇷🇯🇵",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b zero\u00a0width\ufeff",
    "def f(x):\n    return x ** 2  # square\n\n\tprint(f'{x!r}')\n",
    '<div class="a">&amp;</div> $x^2 + y^2 = z^2$ `code` ~|~ [a](b)',
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|endoftext|> c<|im_end|><|im_end|>",
    "not special: <|im_end| > <|im_ end|> <im_end>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===///###",
]

SPLITS = ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"]

CHATS = {
    "one": [{"role": "user", "content": "What is an attention sink?"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b>&"},
        {"role": "assistant", "content": " Hello. \n"},
        {"role": "user", "content": "日本語で?"},
    ],
}

# Written for this test: what templates in the wild use (blocks on lines of their own, trimming,
# tojson, loop controls, generation marks, a namespace).
TEMPLATES = {
    "headers": (
        "{{ bos_token }}{% set seen = namespace(users=0) %}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {% if m.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}\n"
        "<<{{ m['role'] }} {{ seen.users }}>>{{ m['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}<<assistant>>{% endif %}"
    ),
    "json": (
        "{% for m in messages %}{{ m | tojson }}\n"
        "{% generation %}{{ m | tojson(indent=2, ensure_ascii=true) }}{% endgeneration %}\n"
        "{% endfor %}{% if tools is none %}no tools{% endif %}"
    ),
}

CORPUS = """the cat sat on the mat and the dog sat on the log
a stream that never ends needs a cache that never grows
the sinks are the first tokens and the window is the last tokens
attention is all you need but not all of the attention is needed
over and over again the river runs to the sea and the sea is not full
"""

SENTENCEPIECE_TEXTS = [
    "the cat sat on the mat",
    " the  cat",
    "  two   spaces and the end  ",
    "attention sinks",
    "日本 and 👍",
    "naïve\nthe",
    "TOKENS 123",
    "thethat onthen andover ofthenend isnot streamends thatten sinksareall",
    "atheran dogrows neveragain eeded theandthe firsttokens lasttofull osea",
    "",
]


class LlamaCpp:
    """llama.cpp's own tokenizer, through the C functions that xllamacpp exports."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))

        # Bigger than the real struct, which differs from version to version: it is passed on the
        # stack, where the callee reads only its beginning.
        class Params(ctypes.Structure):
            _fields_ = [("opaque", ctypes.c_uint64 * 64)]

        self._lib.llama_model_default_params.restype = Params
        self._lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
        self._lib.llama_model_load_from_file.restype = ctypes.c_void_p
        self._lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        self._lib.llama_model_get_vocab.restype = ctypes.c_void_p
        self._lib.llama_tokenize.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ]
        params = self._lib.llama_model_default_params()
        model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ValueError(f"llama.cpp does not load {path}")
        self._vocab = self._lib.llama_model_get_vocab(model)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])


def with_split(model: Path, split: str, directory: Path) -> Path:
    """Returns a copy of the model whose pre-tokenizer has another name.

    The chat template is cut or filled so that nothing after it moves.
    """
    data = model.read_bytes()
    found = {}
    for key in (b"tokenizer.ggml.pre", b"tokenizer.chat_template"):
        at = data.index(key + (8).to_bytes(4, "little")) + len(key) + 4
        found[key] = (at, int.from_bytes(data[at : at + 8], "little"))
    (pre_at, pre_size), (chat_at, chat_size) = found.values()
    fill = chat_size + pre_size - len(split)
    edits = {
        pre_at: (pre_size, split.encode()),
        chat_at: (chat_size, b"x" * fill),
    }
    for at, (size, value) in sorted(edits.items(), reverse=True):
        data = data[:at] + len(value).to_bytes(8, "little") + value + data[at + 8 + size :]
    copy = directory / f"{split}.gguf"
    copy.write_bytes(data)
    return copy


def tiny_sentencepiece() -> dict[str, object]:
    """Trains a small SentencePiece BPE model; returns it as GGUF metadata, with ids of texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def kind(i: int) -> int:
        if sp.is_unknown(i):
            return 2
        return 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1

    size = range(sp.get_piece_size())
    return {
        "metadata": {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in size],
            "tokenizer.ggml.scores": [sp.get_score(i) for i in size],
            "tokenizer.ggml.token_type": [kind(i) for i in size],
            "tokenizer.ggml.bos_token_id": sp.bos_id(),
            "tokenizer.ggml.eos_token_id": sp.eos_id(),
            "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        },
        "texts": [
            {"text": text, "ids": sp.encode(text), "decoded": sp.decode(sp.encode(text))}
            for text in SENTENCEPIECE_TEXTS
        ],
    }


def main(path: str) -> None:
    model = Path(path).resolve()
    hf = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    texts: list[dict[str, object]] = [
        {"text": text, "transformers": hf(text)["input_ids"], "llama.cpp": {}} for text in TEXTS
    ]
    for entry in texts:
        entry["decoded"] = hf.decode(entry["transformers"], skip_special_tokens=True)
    with tempfile.TemporaryDirectory() as directory:
        for split in SPLITS:
            llama = LlamaCpp(with_split(model, split, Path(directory)))
            for entry in texts:
                entry["llama.cpp"][split] = llama.encode(entry["text"])

    templates = {"smollm2": hf.chat_template, **TEMPLATES}
    chats = [
        {
            "template": name,
            "messages": messages,
            "add_generation_prompt": prompt,
            "text": hf.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            ),
        }
        for name, template in templates.items()
        for messages in CHATS.values()
        for prompt in (False, True)
    ]
    reference = {
        "made_by": {
            name: version(name)
            for name in ("transformers", "tokenizers", "xllamacpp", "sentencepiece", "gguf")
        },
        "texts": texts,
        "templates": templates,
        "chats": chats,
        "sentencepiece": tiny_sentencepiece(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(reference, ensure_ascii=True, indent=1)
    # Lists of numbers on one line each.
    text = re.sub(r"\[[-\d\s.,e]+\]", lambda m: re.sub(r"\s+", "", m[0]), text)
    OUT.write_text(text + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
