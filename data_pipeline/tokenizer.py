"""SentencePiece tokenizers that give back every text exactly."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_pipeline.cached_encoding import SPACE, UnitEncoder, can_cut
from data_pipeline.errors import CorruptDataError, DataError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
TYPES = ("bpe", "unigram")
_EASILY_LOST = "  A\tb\r\n\n \ufb01 e\u0301 \u00bd\u4e00\U0001f642\u0e01 "
_LINE_CHARS = 4000
# normalizer_spec {add_dummy_prefix: false}; behind a model, it takes the place of what that says.
_NO_PREFIX = b"\x1a\x02\x18\x00"
# Part of what a unigram model becomes, and written into every model: never the number of cores.
_UNIGRAM_THREADS = 4


class Tokenizer:
    """Text to token ids and back, from the bytes of a SentencePiece model.

    Ids and counts: `vocab_size`, `unk_id`, `bos_id`, `eos_id`, `pad_id`; `sha256` names the model.
    A bos or eos that the model lacks gets an id behind its vocabulary; a pad that it lacks is its
    eos. Pickled, it is the bytes of the model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
        except (RuntimeError, OSError):
            raise DataError("these bytes are not a SentencePiece model") from None
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._in_file: int = self._sp.GetPieceSize()
        self.vocab_size = self._in_file
        self.unk_id, self.bos_id = self._sp.unk_id(), self._sp.bos_id()
        self.eos_id, self.pad_id = self._sp.eos_id(), self._sp.pad_id()
        if self.bos_id < 0:
            self.bos_id, self.vocab_size = self.vocab_size, self.vocab_size + 1
        if self.eos_id < 0:
            self.eos_id, self.vocab_size = self.vocab_size, self.vocab_size + 1
        if self.pad_id < 0:
            self.pad_id = self.eos_id
        marks = [self._sp.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_mark = marks if all(map(self._sp.IsByte, marks)) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_bytes, (self.model,)

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """From a SentencePiece .model or a Hugging Face tokenizer.json.

        DataError where the file is absent or neither of the two.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); name a .model file"
            ) from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @staticmethod
    def from_bytes(model: bytes) -> Tokenizer:
        """From the content of such a file; what it is shows at its beginning."""
        if model.lstrip()[:1] == b"{":
            from data_pipeline.huggingface import HuggingFaceTokenizer

            return HuggingFaceTokenizer(model)
        return Tokenizer(model)

    def describe(self) -> dict[str, Any]:
        """All there is to know of the tokenizer, as JSON; what a manifest holds."""
        return {
            "kind": self.kind,
            "sentencepiece_version": sentencepiece.__version__,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "unk_id": self.unk_id,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "model_base64": base64.b64encode(self.model).decode(),
        }

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> Tokenizer:
        """The tokenizer that describe() told of; CorruptDataError if its hash is another."""
        try:
            model = base64.b64decode(described["model_base64"], validate=True)
        except binascii.Error:
            model = b""
        if hashlib.sha256(model).hexdigest() != described["sha256"]:
            raise CorruptDataError(
                "tokenizer of the manifest", "the model does not match its sha256"
            )
        return cls.from_bytes(model)

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]: the tokens of `text`, without bos and eos."""
        if self._space_mark is None or SPACE not in text:
            return self._encode(text)
        first, *others = text.split(SPACE)
        joined = [ids for part in others for ids in (self._space_mark, self._encode_further(part))]
        return np.concatenate([self._encode(first), *joined]).astype(np.int32)

    @cached_property
    def never_cut(self) -> str:
        """Why text has to be encoded as a whole, or nothing where units of it may be."""
        pieces = [self.piece(token) for token in range(self._in_file)]
        if can_cut(self.model, pieces):
            return ""
        return "the model is not a lossless byte-pair model whose tokens stay within words"

    @property
    def reserved_texts(self) -> list[str]:
        """Texts that another program may take for a special token or a space."""
        special = [
            token
            for token in range(self._in_file)
            if self._sp.IsControl(token) or self._sp.IsUnknown(token)
        ]
        return [SPACE, *map(self.piece, special)]

    @cached_property
    def _encode(self) -> Callable[[str], np.ndarray]:
        """Encodes text without U+2581, which SentencePiece itself takes for a space."""
        if not self.never_cut:
            return UnitEncoder(self._sp).encode
        return lambda text: np.array(self._sp.EncodeAsIds(text), np.int32)

    @cached_property
    def _encode_further(self) -> Callable[[str], np.ndarray]:
        """The same for what follows in a text, where no model puts a space of its own."""
        if not self.never_cut:
            return self._encode
        inner = sentencepiece.SentencePieceProcessor()
        inner.LoadFromSerializedProto(self.model + _NO_PREFIX)
        return lambda text: np.array(inner.EncodeAsIds(text), np.int32)

    def encode_document(self, text: str) -> np.ndarray:
        """int32 [n + 2]: bos, the tokens of `text`, eos; what a shard stores."""
        return np.concatenate([[self.bos_id], self.encode(text), [self.eos_id]]).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens stand for nothing."""
        return self._sp.DecodeIds([int(i) for i in ids if i < self._in_file])

    @property
    def lossless(self) -> bool:
        """Whether spaces, newlines and rare characters come back."""
        return self.decode(self.encode(_EASILY_LOST)) == _EASILY_LOST

    def piece(self, token: int) -> str:
        """How the model writes a token: spaces as U+2581, single bytes as <0x41>."""
        if token >= self._in_file:
            return {self.bos_id: "<s>", self.eos_id: "</s>"}[token]
        return self._sp.IdToPiece(token)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of UTF-8 text that each token stands for; special tokens 0."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for token in range(self._in_file):
            if self._sp.IsByte(token):
                sizes[token] = 1
            elif not (self._sp.IsControl(token) or self._sp.IsUnknown(token)):
                sizes[token] = len(self._sp.IdToPiece(token).replace(SPACE, " ").encode())
        return sizes


class _Lines:
    """The lines of texts. What reading them raised is kept: SentencePiece makes text of it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.raised: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    for start in range(0, len(line), _LINE_CHARS):
                        yield line[start : start + _LINE_CHARS]
        except GeneratorExit:  # SentencePiece read no further
            raise
        except BaseException as error:
            self.raised = error
            raise


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Tokenizer:
    """Train on `texts`; lossless, with byte fallback and unk 0, bos 1, eos 2, pad 3.

    The same texts in the same order give the same model. DataError where the text is too small for
    the vocabulary, or too varied; what reading `texts` raises is passed on.
    """
    if kind not in TYPES:
        raise DataError(f"tokenizer type {kind!r}: choose one of {', '.join(TYPES)}")
    model, lines = io.BytesIO(), _Lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            max_sentence_length=8 * _LINE_CHARS,
            character_coverage=0.9995,
            num_threads=_UNIGRAM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if lines.raised is not None:
            raise lines.raised from None
        reason = str(error).strip().rsplit("] ", 1)[-1] or str(error).strip()
        raise DataError(
            f"SentencePiece cannot train {vocab_size} tokens on this text ({reason}): "
            "choose another --vocab-size or give more text"
        ) from None
    return Tokenizer(model.getvalue())
