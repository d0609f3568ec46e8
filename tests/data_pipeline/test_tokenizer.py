import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from data_pipeline import CorruptDataError, DataError, Tokenizer, cli, train_tokenizer, training
from data_pipeline.tokenizing import tokenize
from data_pipeline.training import train_to_file
from data_pipeline.verify import verify
from tests.data_pipeline.conftest import WORDS, write_texts

HARD = [
    "",
    " ",
    "  leading and trailing  ",
    "tab\tand\r\nCRLF\n\n\nlines\r",
    "\u2581 the mark of a space \u2581\u2581",
    "</s><s><unk><pad><0x0A>\u2047",
    "emoji 😀👩\u200d👩\u200d👧 and ﬁ ligature, ½, Å versus A\u030a",
    "\x00\x01\x7f\u0085\u2028\ufeff\U0010ffff",
    "12345678901234567890",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def either(request, texts):
    return train_tokenizer(texts.values(), 450, request.param)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(either, text):
    assert either.decode(either.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(either, text):
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert either.token_bytes[ids].sum() == len(text.encode())
    specials = {either.unk_id, either.bos_id, either.eos_id, either.pad_id}
    assert not specials & set(ids.tolist())


def test_real_text_comes_back(either, texts):
    for text in texts.values():
        assert either.decode(either.encode(text)) == text


def test_special_tokens_are_where_they_should_be(either):
    assert (either.unk_id, either.bos_id, either.eos_id, either.pad_id) == (0, 1, 2, 3)
    assert either.vocab_size == 450
    assert either.token_bytes[:4].tolist() == [0, 0, 0, 0]
    assert either.decode([1, *either.encode("a b"), 2, 3]) == "a b"
    document = either.encode_document("a b")
    assert document.tolist() == [1, *either.encode("a b"), 2]
    assert document.dtype == np.int32


def test_every_newline_and_digit_is_a_token_of_its_own(either):
    ids = either.encode("a\n\n12")
    assert [either.decode([i]) for i in ids][-4:] == ["\n", "\n", "1", "2"]


def test_digits_are_never_joined():
    tokenizer = train_tokenizer(["1234 cab 1234 bac " * 500], 275)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]


def test_training_is_deterministic(either, texts):
    kind = "bpe" if either.model == train_tokenizer(texts.values(), 450).model else "unigram"
    assert train_tokenizer(texts.values(), 450, kind).model == either.model


def test_long_lines_are_learnt_from():
    text = "abcdefgh ijklmnop " * 3000
    tokenizer = train_tokenizer([text], 300)
    assert len(tokenizer.encode("abcdefgh ijklmnop ")) <= 3


def test_description_carries_the_model(tokenizer):
    described = tokenizer.describe()
    assert Tokenizer.from_description(described).sha256 == tokenizer.sha256
    for broken in ("", "!", described["model_base64"][:-8]):
        with pytest.raises(CorruptDataError):
            Tokenizer.from_description({**described, "model_base64": broken})


@pytest.mark.parametrize(("kind", "size"), [("bpe", 100_000), ("unigram", 100_000), ("bpe", 260)])
def test_impossible_sizes_are_explained(texts, kind, size):
    with pytest.raises(DataError, match=f"cannot train {size} tokens"):
        train_tokenizer(texts.values(), size, kind)


def test_wrong_kind_and_no_text(texts):
    with pytest.raises(DataError, match="choose one of bpe, unigram"):
        train_tokenizer(texts.values(), 450, "wordpiece")
    with pytest.raises(DataError, match="cannot train"):
        train_tokenizer([], 450)


def test_what_reading_raises_is_not_the_vocabularys_fault(tmp_path, capsys):
    """SentencePiece makes one RuntimeError of a bad record, a disk's error and a signal."""
    (tmp_path / "a.jsonl").write_text('{"text": "def self"}\n{"body": ""}\n')
    command = ["tokenizer", "train", "--input", str(tmp_path), "--vocab-size", "400"]
    assert cli.main([*command, "--model-out", str(tmp_path / "a.model")]) == 2
    told = f"{tmp_path}/a.jsonl: line 2: no field 'text'; correct the file or leave it out"
    assert capsys.readouterr().err.splitlines()[-1] == f"data_pipeline: {told}"

    def texts(error):
        yield "def self"
        raise error

    for error in (KeyboardInterrupt(), OSError(5, "disk")):
        with pytest.raises(type(error)) as raised:
            train_tokenizer(texts(error), 400)
        assert raised.value is error


def test_a_model_file_is_trained_once(text_folder, tmp_path):
    path = tmp_path / "deep" / "t.model"
    first, trained = train_to_file([str(text_folder)], path, 400)
    assert trained
    before = path.stat().st_mtime_ns
    second, trained = train_to_file([str(text_folder)], path, 400)
    assert not trained
    assert second.sha256 == first.sha256
    assert path.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="vocab_size differ"):
        train_to_file([str(text_folder)], path, 401)
    with pytest.raises(DataError, match="input_xxh3_128 differ"):
        train_to_file([str(text_folder)], path, 400, text_field="body")
    other = write_texts(tmp_path / "texts", {"a.txt": "other"})
    with pytest.raises(DataError, match="input_xxh3_128 differ"):
        train_to_file([str(other)], path, 400)
    path.write_bytes(first.model + b"\x00")
    with pytest.raises(DataError):
        train_to_file([str(text_folder)], path, 400)


def test_training_shows_how_far_it_is(text_folder, tmp_path, monkeypatch):
    bars = []

    def show(**options):
        bars.append(tqdm(**{**options, "disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(training, "tqdm", show)
    train_to_file([str(text_folder)], tmp_path / "a.model", 400)
    (bar,) = bars
    size = sum(path.stat().st_size for path in text_folder.rglob("*.txt"))
    assert (bar.n, bar.total, bar.desc) == (size, size, "read, now learning: ")


def foreign_model(path, **options):
    """A model as other programs train them: with SentencePiece's own defaults."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(WORDS.split("\n")),
            model_writer=file,
            vocab_size=400,
            minloglevel=2,
            **options,
        )
    return Tokenizer.open(path)


def test_a_model_without_bos_gets_one_behind_its_vocabulary(text_folder, tmp_path):
    tokenizer = foreign_model(tmp_path / "a.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    found = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id)
    assert found == (0, 1, 2, 400)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 401
    assert tokenizer.piece(400) == "<s>"
    document = tokenizer.encode_document("def of self")
    assert (document[0], document[-1]) == (400, 1)
    assert tokenizer.decode(document) == "def of self"
    tokenize([str(text_folder)], tokenizer, tmp_path / "out")
    assert verify(tmp_path / "out")[1] == []


def test_a_model_that_loses_text_is_said_to(text_folder, tmp_path, either, capsys):
    assert either.lossless
    assert not foreign_model(tmp_path / "a.model").lossless
    options = {"byte_fallback": True, "normalization_rule_name": "identity"}
    kept = foreign_model(tmp_path / "b.model", **options, remove_extra_whitespaces=False)
    assert kept.lossless
    for text in ("def\u2581self", "\u2581 a", " \u2581 \u2581 ", "\u2581", " a", "\u2581\u2581b"):
        assert kept.decode(kept.encode(text)) == text  # it puts a space before a text, and once
    assert kept.encode("def of self").tolist() == kept._sp.EncodeAsIds("def of self")
    for name in ("a", "b"):
        command = ["tokenize", "--input", str(text_folder), "--out", str(tmp_path / name)]
        assert cli.main([*command, "--tokenizer", str(tmp_path / f"{name}.model")]) == 0
        assert ("do not come back exactly" in capsys.readouterr().out) == (name == "a")


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "x.model").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"x\.model: .*not a SentencePiece model"):
        Tokenizer.open(tmp_path / "x.model")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.open(tmp_path / "y.model")
