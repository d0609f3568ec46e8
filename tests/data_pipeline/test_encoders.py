"""gigatoken beside SentencePiece and Hugging Face tokenizers: the same ids, or it is not used."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import DataError, Tokenizer, cli, encoders, train_tokenizer
from data_pipeline.encoders import DocumentEncoder, Gigatoken, choose
from data_pipeline.tokenizing import tokenize
from tests.data_pipeline.conftest import SHARD_BYTES
from tests.data_pipeline.test_huggingface import byte_level

pytest.importorskip("gigatoken", reason="optional package")

TEXT = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [" ", "  ", "\n", "\r\n", "\t", "\u2581", "<s>", "</s>", "<unk>", "<0x41>"]
        ),
        st.sampled_from(["def f(x):", "return", "123", "don't", "\u65e5\u672c", "\U0001f600"]),
    ),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def fast(tokenizer):
    return Gigatoken(tokenizer)


@settings(max_examples=500, deadline=None)
@given(TEXT)
def test_any_text_has_the_ids_of_sentencepiece(tokenizer, fast, text):
    np.testing.assert_array_equal(fast(text), tokenizer.encode(text))


def test_documents_have_the_ids_of_sentencepiece(tokenizer, fast, texts):
    for text in texts.values():
        np.testing.assert_array_equal(fast(text), tokenizer.encode(text))


@pytest.fixture(scope="module", params=[("<|endoftext|>",), ("<s>", "</s>", "<pad>"), ()])
def hugging_face(request, texts):
    return Tokenizer.from_bytes(byte_level(texts, request.param).to_str().encode())


@pytest.fixture(scope="module")
def fast_hugging_face(hugging_face):
    assert choose(hugging_face)[0] == "gigatoken"
    return Gigatoken(hugging_face)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_any_text_has_the_ids_of_a_hugging_face_tokenizer(hugging_face, fast_hugging_face, text):
    for whole in (text, text + "<|endoftext|>"):
        np.testing.assert_array_equal(fast_hugging_face(whole), hugging_face.encode(whole))


def test_it_is_chosen_where_it_is_the_same(tokenizer):
    assert choose(tokenizer) == choose(tokenizer, "gigatoken")
    assert choose(tokenizer)[0] == "gigatoken"
    assert choose(tokenizer, "exact") == ("exact", "as asked")


def test_a_unigram_model_is_left_to_sentencepiece(texts):
    unigram = train_tokenizer(texts.values(), 512, "unigram")
    encoder, why = choose(unigram)
    assert encoder == "exact"
    assert "byte-pair" in why
    with pytest.raises(DataError, match=r"--encoder gigatoken: .*byte-pair"):
        choose(unigram, "gigatoken")


def test_why_a_model_is_not_read_is_one_line(texts):
    """Gigatoken adds where in its own source it stopped."""
    made = byte_level(texts)
    model = json.loads(made.to_str())
    model["model"]["vocab"].pop("\u0100")  # byte 0
    encoder, why = choose(Tokenizer.from_bytes(json.dumps(model).encode()))
    assert encoder == "exact"
    assert why.startswith("gigatoken does not read the model (")
    assert "\n" not in why


class Wrong(Gigatoken):
    """Errs where the text holds a word."""

    def __call__(self, text):
        return super().__call__(text.replace("return", "retur"))


def test_one_that_errs_is_not_chosen(tokenizer, monkeypatch):
    monkeypatch.setattr(encoders, "Gigatoken", Wrong)
    monkeypatch.setattr(encoders, "_EDGES", ("return",))
    assert choose(tokenizer) == ("exact", "gigatoken gives other ids for 'return'")


def test_one_that_errs_later_stops_the_run(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(encoders, "Gigatoken", Wrong)
    (tmp_path / "a.txt").write_text("a return b")
    with pytest.raises(DataError, match=r"document a.txt: gigatoken gives other ids"):
        tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "c", encoder="gigatoken")
    assert not list((tmp_path / "c").glob("*.tok"))
    encode = DocumentEncoder(tokenizer, "gigatoken")
    encode("first", "")
    for number in range(1, 256):
        encode(str(number), "return")
    with pytest.raises(DataError, match="document 256"):
        encode("256", "return")
    encode = DocumentEncoder(tokenizer, "gigatoken")
    for number in range(256):
        encode(str(number), "a b " * 2000)
    with pytest.raises(DataError, match="document 256"):
        encode("256", "a return b " * 2000)


@pytest.mark.parametrize("workers", [1, 2])
def test_both_write_the_same_bytes(text_folder, corpus_folder, tokenizer, tmp_path, workers):
    out = tmp_path / "c"
    tokenize([str(text_folder)], tokenizer, out, workers, SHARD_BYTES, encoder="gigatoken")
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written == {path.name: path.read_bytes() for path in corpus_folder.iterdir()}


def test_the_command_says_which(text_folder, tokenizer, tmp_path, capsys, monkeypatch):
    model = tmp_path / "t.model"
    model.write_bytes(tokenizer.model)
    command = ["tokenize", "--input", str(text_folder), "--tokenizer", str(model), "--out"]
    assert cli.main([*command, str(tmp_path / "a")]) == 0
    assert "encoder      gigatoken (gigatoken 0." in capsys.readouterr().out
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert cli.main([*command, str(tmp_path / "b")]) == 0
    assert "encoder      exact (gigatoken is not installed)" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "c"), "--encoder", "gigatoken"]) == 2
    assert "gigatoken is not installed" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
