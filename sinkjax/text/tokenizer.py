"""Text to token ids and back, from a Hugging Face folder or from GGUF metadata.

The byte-pair encoding itself is done by the Rust library `tokenizers`. Decoding is done here: a
token is a string of bytes, a text is the UTF-8 reading of its tokens' bytes, and what is not
UTF-8 becomes U+FFFD. With that one rule a text can be decoded token by token
(`sinkjax.text.detokenize`) and comes out the same as when it is decoded at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from sinkjax.files import replaced
from sinkjax.text import chat

_SPACE = "▁"  # SentencePiece's visible space

# How a text is cut before BPE, by `tokenizer.ggml.pre`: patterns applied one after another.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LARGE, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LARGE}*{_SMALL}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_LARGE}+{_SMALL}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_SPLIT,),
    "llama-bpe": (_LLAMA3_SPLIT,),
    "qwen2": (_LLAMA3_SPLIT.replace("{1,3}", ""),),
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "olmo": (_GPT2_SPLIT,),  # of GPT-NeoX too
    "mpt": (_GPT2_SPLIT,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_SPLIT, r"[0-9][0-9][0-9]"),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "gpt-4o": (_O200K_SPLIT,),  # of gpt-oss
}

# `tokenizer.ggml.token_type`
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class Tokenizer:
    """A model's tokenizer, with the token ids and the chat template that belong to it.

    Args:
        backend: the Rust tokenizer. Its decoder must be byte-level or SentencePiece-style.
        bos_id: the id that begins a text, if the model has one.
        eos_ids: the ids that end a text or a turn.
        add_bos: whether the model's own tokenizer puts `bos_id` before a text.
        chat_template: the Jinja source of the chat template, if the model has one.

    Raises:
        ValueError: an id is not in the vocabulary, `add_bos` without a `bos_id`, or a decoder
            of another kind.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self._byte_level, self.strips_leading_space = _decoder_kind(backend)
        self._added = backend.get_added_tokens_decoder()
        vocab_ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(vocab_ids, default=-1) + 1
        self.bos_id = None if bos_id is None else int(bos_id)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(map(int, eos_ids)))
        self.add_bos = add_bos
        self.chat_template = chat_template
        self._bytes: dict[int, bytes] = {}
        for token_id in (*self.eos_ids, *(() if bos_id is None else (bos_id,))):
            self.token_bytes(token_id)
        if add_bos and bos_id is None:
            raise ValueError("add_bos is True but the tokenizer has no bos_id; give one")

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None
    ) -> Self:
        """Reads `tokenizer.json` and the Hugging Face files that lie beside it.

        Those are, where they exist: `tokenizer_config.json`, `special_tokens_map.json`,
        `generation_config.json` (further end ids) and `chat_template.jinja` (which wins over the
        template in `tokenizer_config.json`).

        Args:
            path: the `tokenizer.json`.
            config: entries that win over those of `tokenizer_config.json`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the files name a token that the vocabulary lacks, or the tokenizer is of
                a kind that is not supported.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: expected the path of tokenizer.json")
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        merged = {
            **_read_json(path.with_name("special_tokens_map.json")),
            **_read_json(path.with_name("tokenizer_config.json")),
            **(config or {}),
        }
        generation = _read_json(path.with_name("generation_config.json"))

        bos_id = _id_of(backend, merged.get("bos_token"), "bos_token")
        if "bos_token" not in merged:
            bos_id = generation.get("bos_token_id")
        eos_id = _id_of(backend, merged.get("eos_token"), "eos_token")
        more_eos = generation.get("eos_token_id")
        eos_ids = [
            *(() if eos_id is None else (eos_id,)),
            *merged.get("eos_token_ids", ()),
            *([more_eos] if isinstance(more_eos, int) else more_eos or ()),
        ]

        add_bos = merged.get("add_bos_token")
        if add_bos is None:  # then the post-processor in tokenizer.json is what decides
            add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]

        template_file = path.with_name("chat_template.jinja")
        if template_file.is_file():
            merged["chat_template"] = template_file.read_text(encoding="utf-8")
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=eos_ids,
            add_bos=bool(add_bos),
            chat_template=_default_template(merged.get("chat_template")),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Builds the tokenizer that a GGUF file describes.

        Args:
            metadata: the file's key-value pairs as plain Python values. Used are `tokenizer.ggml.`
                `model` ("gpt2": byte-level BPE, "llama": SentencePiece BPE), `pre`, `tokens`,
                `token_type`, `merges` or `scores`, the token ids, `add_bos_token` and
                `add_space_prefix`, and `tokenizer.chat_template`.

        Raises:
            ValueError: a key is missing, or the model or its pre-tokenizer is not supported.
        """
        model = _require(metadata, "tokenizer.ggml.model")
        tokens: list[str] = list(_require(metadata, "tokenizer.ggml.tokens"))
        types: list[int] = list(metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens)))
        if len(types) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens; "
                "expected one for each token"
            )
        # Where a file leaves something out, what llama.cpp assumes holds.
        ids: dict[str, Any] = {
            name: metadata.get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos", "eot", "eom", "unknown")
        }
        if model == "gpt2":
            pre = metadata.get("tokenizer.ggml.pre", "default")
            backend = _byte_level_bpe(tokens, _require(metadata, "tokenizer.ggml.merges"), pre)
            add_bos_default = pre == "llama-bpe"
        elif model == "llama":
            scores = list(_require(metadata, "tokenizer.ggml.scores"))
            for name, default in {"unknown": 0, "bos": 1, "eos": 2}.items():
                ids[name] = default if ids[name] is None else ids[name]
            space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
            backend = _sentencepiece_bpe(
                tokens, types, scores, tokens[ids["unknown"]], space_prefix
            )
            add_bos_default = True
        else:
            raise ValueError(
                f"tokenizer.ggml.model is {model!r}; supported are 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece BPE)"
            )
        backend.add_tokens(
            [
                AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
            ]
        )

        bos_id = ids["bos"]
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos_default))
        tokenizer = cls(
            backend,
            bos_id=bos_id,
            eos_ids=[ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None],
            add_bos=add_bos,
            chat_template=metadata.get("tokenizer.chat_template"),
        )
        if add_bos and bos_id is not None:
            # `encode` does not need it, but other readers of a saved tokenizer.json do.
            backend.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos_id]}:0 $A:0",
                pair=f"{tokens[bos_id]}:0 $A:0 {tokens[bos_id]}:1 $B:1",
                special_tokens=[(tokens[bos_id], bos_id)],
            )
        return tokenizer

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Returns the token ids of `text`.

        As in Hugging Face tokenizers, the spelling of a special token inside `text` (such as
        `<|im_end|>`) *becomes* that token, wherever the text came from.

        Args:
            text: any text. What `apply_chat` returns already spells its beginning: encode it
                with `add_bos=False`.
            add_bos: whether to put `bos_id` first; None does what the model's tokenizer does.

        Raises:
            ValueError: `add_bos=True` and the tokenizer has no `bos_id`.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_id is None:
            raise ValueError("add_bos=True, but this tokenizer has no bos_id; use add_bos=False")
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, with U+FFFD where their bytes are not UTF-8.

        For SentencePiece vocabularies the space that encoding puts first is taken off again.

        Args:
            ids: token ids.
            skip_special: leave special tokens out.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        kept = (self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)
        text = b"".join(kept).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """Returns the UTF-8 bytes, perhaps part of a character, that one token stands for.

        Args:
            token_id: the token.
            skip_special: return no bytes for a special token.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        token_id = int(token_id)
        added = self._added.get(token_id)
        if added is not None and added.special and skip_special:
            return b""
        if token_id not in self._bytes:
            token = self._backend.id_to_token(token_id) if 0 <= token_id else None
            if token is None:
                raise ValueError(
                    f"token id {token_id} is not in the vocabulary of size {self.vocab_size}; "
                    f"expected one of its ids, from 0 to {self.vocab_size - 1}"
                )
            # Added tokens are spelled in plain text, not in a vocabulary's alphabet.
            if self._byte_level:
                self._bytes[token_id] = token.encode() if added else _from_byte_alphabet(token)
            else:
                self._bytes[token_id] = _from_sentencepiece(token)
        return self._bytes[token_id]

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Returns the conversation as the model's chat template writes it.

        Args:
            messages: mappings with a "role" and a "content".
            add_generation_prompt: end with what makes the assistant answer.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
        """
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **self._template_tokens(),
        )

    def next_turn(self, messages: Sequence[Mapping[str, Any]], *, seen: str) -> list[int]:
        """Returns the ids to feed for the next turn to a model that remembers the turns before.

        They are the ids of the whole conversation, rendered anew, less those of `seen`.

        Args:
            messages: the whole conversation, the new messages included.
            seen: the text that the model has read and written so far: the last `apply_chat`, then
                the reply, without a stop token that was sampled but not fed.

        Raises:
            ValueError: the whole conversation does not begin with `seen`, as text or as tokens
                (some templates rewrite or trim earlier turns). Start with an empty cache and feed
                all of `apply_chat(messages)` instead.
        """
        new = chat.next_turn(
            self.chat_template,
            messages,
            seen=seen,
            add_generation_prompt=True,
            **self._template_tokens(),
        )
        before = self.encode(seen, add_bos=False)
        after = self.encode(seen + new, add_bos=False)
        if after[: len(before)] != before:
            raise ValueError(
                f"the text {new[:40]!r}, after {seen[-40:]!r}, changes the tokens before it: the "
                "cache cannot be kept. Start with an empty one and feed the whole conversation"
            )
        return after[len(before) :]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `from_file` reads back.

        Each file is written under a temporary name first, so none is ever half there.

        Args:
            directory: made if it does not exist.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **{"bos_token": None, "eos_token": None, **self._template_tokens()},
            "eos_token_ids": list(self.eos_ids),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write(directory / "tokenizer.json", self._backend.to_str())
        _write(
            directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2)
        )

    def _template_tokens(self) -> dict[str, str]:
        named = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {
            name: self.token_bytes(token_id).decode()
            for name, token_id in named.items()
            if token_id is not None
        }


def _byte_level_bpe(tokens: list[str], merges: Iterable[str], pre: str) -> tokenizers.Tokenizer:
    if pre not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}; supported are {', '.join(sorted(_SPLITS))}. "
            "Use the model's tokenizer.json with Tokenizer.from_file instead"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(
                f"tokenizer.ggml.merges has {merge!r}; expected 'left right', where left, right "
                "and both together are tokens"
            )
        pairs.append((left, right))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            pairs,
            # Llama 3 takes a word that is a token as it is, even where no merge leads to it.
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    tokens: list[str], types: list[int], scores: list[float], unknown: str, space_prefix: bool
) -> tokenizers.Tokenizer:
    if len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens; "
            "expected one for each token"
        )
    # SentencePiece joins the two neighbours whose union scores best. As a list of merges: every
    # way to cut a token in two, by the score of the token.
    normal = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == _NORMAL
    }
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda token: -normal[token])
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in normal and token[cut:] in normal
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    visible = normalizers.Replace(" ", _SPACE)
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = visible
    backend.decoder = decoders.Sequence(steps)
    return backend


def _decoder_kind(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Returns whether the decoder is byte-level, and whether it strips one leading space."""
    decoder = backend.decoder
    spec: dict[str, Any] = {"type": None} if decoder is None else json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return True, False
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:2] == ["Replace", "ByteFallback"] and steps[0] == replace:
        if kinds[2:] == []:
            return False, False
        if kinds[2:] == ["Strip"] and steps[-1] == strip:
            return False, True
    raise ValueError(
        f"the tokenizer's decoder is {json.dumps(spec)}; supported are ByteLevel, and Replace "
        f"({_SPACE} by a space), ByteFallback, Fuse and perhaps Strip (one leading space)"
    )


def _byte_alphabet() -> dict[str, int]:
    # GPT-2 spells a byte as the Latin-1 character it is, where that is visible; the others are,
    # in order, the characters from U+0100 on.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


_BYTE_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(token: str) -> bytes:
    try:
        return bytes(_BYTE_ALPHABET[character] for character in token)
    except KeyError:  # an entry that is not spelled in the alphabet, such as padding
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _require(metadata: Mapping[str, Any], key: str) -> Any:
    if metadata.get(key) is None:
        raise ValueError(f"the GGUF metadata has no {key!r}: the file carries no usable tokenizer")
    return metadata[key]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _id_of(backend: tokenizers.Tokenizer, token: Any, name: str) -> int | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is None:
        return None
    token_id = backend.token_to_id(content)
    if token_id is None:
        raise ValueError(f"{name} is {content!r}, which is not in the tokenizer's vocabulary")
    return token_id


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
    if not isinstance(template, list):
        return template
    return {entry["name"]: entry["template"] for entry in template}.get("default")


def _write(path: Path, text: str) -> None:
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")
