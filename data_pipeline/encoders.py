"""Which program encodes: the tokenizer's own library, or gigatoken where that is the same.

gigatoken encodes several times faster. It is believed only where the units of `cached_encoding.py`
hold (a lossless byte-pair model) or for a Hugging Face tokenizer, and only after a comparison on
strings made of the vocabulary itself. Text that names special tokens goes to the tokenizer's own
library, and while a corpus is written, documents are compared again and again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import Tokenizer

ENCODERS = ("auto", "exact", "gigatoken")
Encode = Callable[[str], np.ndarray]
_PROBES, _PROBE_PIECES, _LONG_PROBE = 4000, 24, 2000
_COMPARED, _COMPARED_CHARACTERS = 256, 4096
_EDGES = (
    "", " ", "  ", "\n", " \n ", "\n\n\n", "\t", "\r\n", "\0", "a", " a", "a ", "A" * 300,
    " " * 300, "\u00e9", "e\u0301", "\u00df", "\u00a0", "\u2028", "\ufeff", "\u65e5\u672c\u8a9e",
    "\ud55c\uad6d", "\u0627\u0644\u0639\u0631\u0628", "\U0001f642", "\U0001f469\u200d\U0001f467",
    "\U0010ffff", "0123456789", "3.14159", "--", "!?", "http://a.b/c?d=e&f", "don't", "I'LL",
    "x\u200by", "<", "<0x41>",
)  # fmt: skip


class NotTheSameError(DataError):
    """gigatoken cannot stand in for this tokenizer, and why."""


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Strings that a wrong encoder would stumble over: the same ones for the same tokenizer."""
    yield from _EDGES
    random_ = random.Random(tokenizer.sha256)
    pieces = [
        text
        for token in range(tokenizer.vocab_size)
        if (text := tokenizer.decode([token])) and "\ufffd" not in text
    ]
    for size in [random_.randint(1, _PROBE_PIECES) for _ in range(_PROBES)] + [_LONG_PROBE] * 4:
        parts = random_.choices(pieces, k=size)
        for _ in range(random_.choice((0, 0, 1, size))):
            parts.insert(random_.randrange(len(parts) + 1), random_.choice(_EDGES))
        yield "".join(parts)


class Gigatoken:
    """text -> ids like `tokenizer.encode`. NotTheSameError where gigatoken does not do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if reason := tokenizer.never_cut:
            raise NotTheSameError(reason)
        try:
            import gigatoken
        except ImportError:
            raise NotTheSameError("gigatoken is not installed") from None
        try:
            made = (
                gigatoken.Tokenizer.from_json(tokenizer.model)
                if tokenizer.kind == "huggingface"
                else gigatoken.Tokenizer.from_sentencepiece(tokenizer.model)
            )
            self._encode = made.backend.encode
        except Exception as error:
            reason = str(error).partition("\n")[0]  # below it, where in gigatoken's own source
            raise NotTheSameError(f"gigatoken does not read the model ({reason})") from None
        self.version = version("gigatoken")
        self._exact = tokenizer.encode
        self._marks = tokenizer.reserved_texts
        self._beginnings = sorted({mark[:2] for mark in self._marks})

    def __call__(self, text: str) -> np.ndarray:
        """int32 [n]: the ids of `text`, without bos and eos."""
        if any(begin in text for begin in self._beginnings) and any(
            mark in text for mark in self._marks
        ):
            return self._exact(text)
        return np.asarray(self._encode(text)).view(np.int32)


def choose(tokenizer: Tokenizer, wanted: str = "auto") -> tuple[str, str]:
    """(the encoder to use, why), for `wanted`, one of ENCODERS.

    "auto" takes gigatoken where it is installed and gives the same ids for some thousand strings;
    "gigatoken" raises DataError where it does not.
    """
    if wanted == "exact":
        return "exact", "as asked"
    try:
        encode = Gigatoken(tokenizer)
        compared = 0
        for text in _probes(tokenizer):
            if not np.array_equal(encode(text), tokenizer.encode(text)):
                raise NotTheSameError(f"gigatoken gives other ids for {text[:40]!r}")
            compared += 1
    except NotTheSameError as error:
        if wanted == "gigatoken":
            raise DataError(f"--encoder gigatoken: {error}; use --encoder auto") from None
        return "exact", str(error)
    return "gigatoken", f"gigatoken {encode.version}, the same on {compared:,} strings"


class DocumentEncoder:
    """name, text -> int32 [n + 2]: bos, the ids, eos.

    With encoder "gigatoken" the first document is encoded by the tokenizer's own library too, and
    so are up to 4096 characters of every 256th after it: DataError, naming the document, where the
    two differ.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: str) -> None:
        self._tokenizer = tokenizer
        self._fast = Gigatoken(tokenizer) if encoder == "gigatoken" else None
        self._seen = 0

    def __call__(self, name: str, text: str) -> np.ndarray:
        tokenizer = self._tokenizer
        if self._fast is None:
            return tokenizer.encode_document(text)
        inside = self._fast(text)
        ids = np.empty(len(inside) + 2, np.int32)
        ids[0], ids[1:-1], ids[-1] = tokenizer.bos_id, inside, tokenizer.eos_id
        if self._seen % _COMPARED == 0 and not self._agrees(text, inside):
            raise DataError(
                f"document {name}: gigatoken gives other ids than the tokenizer's own library; "
                "remove the output and use --encoder exact"
            )
        self._seen += 1
        return ids

    def _agrees(self, text: str, found: np.ndarray) -> bool:
        assert self._fast is not None
        if self._seen > 0 and len(text) > _COMPARED_CHARACTERS:
            start = self._seen * _COMPARED_CHARACTERS % (len(text) - _COMPARED_CHARACTERS)
            text = text[start : start + _COMPARED_CHARACTERS]
            found = self._fast(text)
        return np.array_equal(found, self._tokenizer.encode(text))
