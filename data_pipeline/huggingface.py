"""Tokenizers that exist as a Hugging Face tokenizer.json; needs the package `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.cached_encoding import SPACE
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import Tokenizer

_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")
_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")
_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """All objects inside a piece of JSON."""
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part:
        if isinstance(inner, dict | list):
            yield from _parts(inner)


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level or byte-fallback tokenizer.json behind the interface of Tokenizer.

    Of bos, eos and pad the usual names are looked for among the special tokens; what is not there
    gets an id behind the vocabulary, so `vocab_size` may be a little larger than the file says.
    Special tokens that stand in the text are encoded as text; tokens that were added without being
    special are not, so none of those is bos, eos or pad.
    """

    kind = "huggingface"
    never_cut = ""

    def __init__(self, model: bytes) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError("a tokenizer.json needs `pip install tokenizers`") from None
        try:
            description = json.loads(model)
            self._hf = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:
            raise DataError(f"not a Hugging Face tokenizer ({error})") from None
        objects = list(_parts(description))
        self._byte_level = any(part.get("type") == "ByteLevel" for part in objects)
        if not (self._byte_level or description["model"].get("byte_fallback")):
            raise DataError("the tokenizer is neither byte-level nor has it byte fallback: lossy")
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        vocabulary = self._hf.get_vocab(with_added_tokens=True)
        added = self._hf.get_added_tokens_decoder()
        self._added = {token: one.content for token, one in added.items()}
        self._specials = {token for token, one in added.items() if one.special}
        self._in_file = self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = self._special(vocabulary, _BOS)
        self.eos_id = self._special(vocabulary, _EOS)
        self.pad_id = self._special(vocabulary, _PAD)
        self.unk_id = vocabulary.get(description["model"].get("unk_token") or "", -1)

    def _special(self, vocabulary: dict[str, int], names: tuple[str, ...]) -> int:
        for name in names:
            if vocabulary.get(name) in self._specials:
                return vocabulary[name]
        self.vocab_size += 1
        return self.vocab_size - 1

    def describe(self) -> dict[str, Any]:
        import tokenizers

        described = super().describe()
        del described["sentencepiece_version"]
        return {**described, "tokenizers_version": tokenizers.__version__}

    @property
    def reserved_texts(self) -> list[str]:
        return list(self._added.values())

    def _spelled(self, token: int) -> list[int]:
        """A special token's text in tokens of single bytes."""
        from tokenizers.pre_tokenizers import ByteLevel

        text = self._added[token]
        if self._byte_level:
            mapped = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
            names = [char for part, _ in mapped for char in part]
        else:
            names = [f"<0x{byte:02X}>" for byte in text.encode()]
        found = [self._hf.token_to_id(name) for name in names]
        ids = [token for token in found if token is not None]
        if len(ids) < len(found):
            raise DataError(
                f"the tokenizer takes {text!r} in a text for its special token and has no tokens "
                "for the single bytes: leave such documents out"
            )
        return ids

    def encode(self, text: str) -> np.ndarray:
        ids = self._hf.encode(text, add_special_tokens=False).ids
        # a unigram model finds a special token that is one of its pieces, whatever it was told
        for token in (self._specials - {self.unk_id}).intersection(ids):
            spelled = self._spelled(token)
            ids = [one for found in ids for one in (spelled if found == token else (found,))]
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        specials = {self.bos_id, self.eos_id, self.pad_id}
        kept = [int(i) for i in ids if int(i) not in specials]
        return self._hf.decode(kept, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        if token >= self._in_file:
            return {self.bos_id: "<bos>", self.eos_id: "<eos>", self.pad_id: "<pad>"}[token]
        return self._hf.id_to_token(token) or ""

    @cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int64)
        specials = {self.bos_id, self.eos_id, self.pad_id, self.unk_id}
        for token in set(range(self._in_file)) - specials:
            piece = self.piece(token)
            if token in self._added:
                sizes[token] = len(self._added[token].encode())
            elif self._byte_level:
                sizes[token] = len(piece)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                sizes[token] = 1
            else:
                sizes[token] = len(piece.replace(SPACE, " ").encode())
        return sizes
