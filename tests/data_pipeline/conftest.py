import random
import shutil
from pathlib import Path

import pytest

from data_pipeline import Corpus, Tokenizer, train_tokenizer
from data_pipeline.tokenizing import tokenize

SHARD_BYTES = 20_000
WORDS = Path(random.__file__).read_text()


def make_texts(seed: int, count: int) -> dict[str, str]:
    """Documents of very different lengths, with everything that is easily lost."""
    rng = random.Random(seed)
    texts = {"empty.txt": "", "one.txt": "x", "odd.txt": "\ta\r\n  b\u2581 é😀 </s> \x00\n\n"}
    for number in range(count):
        length = int(2 ** rng.uniform(3, 13.5))
        start = rng.randrange(len(WORDS) - 1)
        text = (WORDS * 2)[start : start + length]
        texts[f"deep/{number:03d}.txt"] = f"{number} {text}"
    return texts


def write_texts(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    return make_texts(0, 40)


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return train_tokenizer(texts.values(), 512)


@pytest.fixture(scope="session")
def text_folder(texts, tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), texts)


@pytest.fixture(scope="session")
def corpus_folder(text_folder, tokenizer, tmp_path_factory) -> Path:
    """A corpus of several shards of a few frames each; read-only."""
    folder = tmp_path_factory.mktemp("corpora") / "first"
    tokenize([str(text_folder)], tokenizer, folder, shard_bytes=SHARD_BYTES)
    return folder


@pytest.fixture
def corpus(corpus_folder) -> Corpus:
    return Corpus.open(corpus_folder)


@pytest.fixture(scope="session")
def second_folder(tokenizer, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("second")
    texts = write_texts(base / "texts", make_texts(1, 12))
    tokenize([str(texts)], tokenizer, base / "corpus", shard_bytes=SHARD_BYTES)
    return base / "corpus"


@pytest.fixture
def copied(corpus_folder, tmp_path) -> Path:
    """A copy of the corpus to damage."""
    return Path(shutil.copytree(corpus_folder, tmp_path / "copied"))


@pytest.fixture(scope="session")
def documents(texts, tokenizer) -> list[list[int]]:
    """What the corpus must hold, worked out from the texts in plain Python."""
    ordered = sorted(texts.items())
    return [
        [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
        for _, text in ordered
        if text
    ]


@pytest.fixture
def write(tmp_path):
    """write(name, data): a file with these bytes; its path."""

    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write
