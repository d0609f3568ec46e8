"""Train a tokenizer into a file, once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import xxhash
from tqdm import tqdm

from data_pipeline.documents import read_texts
from data_pipeline.errors import DataError
from data_pipeline.files import write_whole
from data_pipeline.sources import Source, find_sources
from data_pipeline.streams import open_bytes
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

_READ_BYTES = 1 << 20


def _recipe(
    sources: Sequence[Source], vocab_size: int, kind: str, text_field: str
) -> dict[str, Any]:
    digest = xxhash.xxh3_128(text_field.encode())
    for source in sources:
        with open_bytes(source.path) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return {
        "type": kind,
        "vocab_size": vocab_size,
        "sentencepiece_version": sentencepiece.__version__,
        "input_xxh3_128": digest.hexdigest(),
    }


def _told(sources: Sequence[Source], text_field: str, bar: Any) -> Iterator[str]:
    """The texts of `sources`, while `bar` shows how far they were read, and what comes then."""
    for source in sources:
        yield from read_texts([source], text_field)
        bar.update(source.size)
    bar.set_description("read, now learning")


def train_to_file(
    inputs: Sequence[str],
    model_out: str | Path,
    vocab_size: int,
    kind: str = "bpe",
    text_field: str = "text",
) -> tuple[Tokenizer, bool]:
    """Train on the files that `inputs` mean and write the model to `model_out`.

    Returns (tokenizer, trained). A model that was trained from the same text in the same way is
    kept: what it was made from stands beside it in `model_out`.json. DataError where a model is
    there that was made otherwise, or the text does not do.
    """
    path = Path(model_out)
    recipe_path = path.with_name(path.name + ".json")
    sources = find_sources(inputs)
    recipe = _recipe(sources, vocab_size, kind, text_field)
    if path.exists():
        tokenizer = Tokenizer.open(path)
        try:
            theirs = json.loads(recipe_path.read_bytes())
        except (OSError, ValueError):
            theirs = {}
        if theirs == {**recipe, "sha256": tokenizer.sha256}:
            return tokenizer, False
        changed = [key for key, value in recipe.items() if theirs.get(key) != value] or ["sha256"]
        raise DataError(
            f"{path}: a model made otherwise is there ({', '.join(changed)} differ); "
            "name another --model-out or remove the file"
        )
    total = sum(source.size for source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="read", disable=None) as bar:
        texts = _told(sources, text_field, bar)
        tokenizer = train_tokenizer(texts, vocab_size, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {**recipe, "sha256": tokenizer.sha256}
    write_whole(recipe_path, json.dumps(note, indent=1).encode() + b"\n")
    write_whole(path, tokenizer.model)
    return tokenizer, True
