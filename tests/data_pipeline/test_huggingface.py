import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="optional package")

from data_pipeline import DataError, Tokenizer  # noqa: E402
from data_pipeline.tokenizing import tokenize  # noqa: E402
from data_pipeline.verify import verify  # noqa: E402
from tests.data_pipeline.plain_reader import read_corpus  # noqa: E402

TEXTS = ["", "plain", "tab\t\r\n  two  é😀", "</s><|endoftext|>\u2581x", "12 345"]


def byte_level(texts, specials=("<|endoftext|>",)):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts.values(), trainer)
    return made


@pytest.fixture(params=[("<|endoftext|>",), ("<s>", "</s>", "<pad>"), ()])
def path(request, texts, tmp_path):
    byte_level(texts, request.param).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts_come_back(path, texts):
    tokenizer = Tokenizer.open(path)
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(specials)) == 3
    assert max(specials) < tokenizer.vocab_size
    for text in [*TEXTS, *texts.values()]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(tokenizer.encode_document(text)) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert not set(specials) & set(ids.tolist())
    assert tokenizer.token_bytes[specials].tolist() == [0, 0, 0]
    assert all(isinstance(tokenizer.piece(i), str) for i in range(tokenizer.vocab_size))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_carries_it(path, text_folder, texts, tmp_path, workers):
    tokenizer = Tokenizer.open(path)
    tokenize([str(text_folder)], tokenizer, tmp_path / "c", workers, 50_000)
    corpus, damages = verify(tmp_path / "c")
    assert damages == []
    assert corpus.tokenizer.encode("a b").tolist() == tokenizer.encode("a b").tolist()
    documents, names, manifest = read_corpus(tmp_path / "c")
    assert manifest["tokenizer"]["kind"] == "huggingface"
    assert {n: tokenizer.decode(d) for n, d in zip(names, documents, strict=True)} == {
        name: text for name, text in texts.items() if text
    }


def test_an_added_token_that_is_not_special_does_not_end_documents(texts, tmp_path):
    made = byte_level(texts, ())
    made.add_tokens(["</s>", "<|endoftext|>"])
    tokenizer = Tokenizer.from_bytes(made.to_str().encode())
    (tmp_path / "a.txt").write_text("one </s> two <|endoftext|>")
    tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "c")
    corpus, damages = verify(tmp_path / "c")
    assert damages == []
    assert tokenizer.decode(corpus.read(0, corpus.num_tokens)) == "one </s> two <|endoftext|>"
    assert corpus.text_bytes == tokenizer.token_bytes[corpus.read(0, corpus.num_tokens)].sum()


def test_byte_fallback_like_llama():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {"\u2581": 259, "a": 260, "\u2581a": 261}
    model = tokenizers.models.BPE(
        vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    parts = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
    made.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    from data_pipeline.huggingface import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(made.to_str().encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 262)
    ids = tokenizer.encode(" a é")
    assert ids.tolist() == [261, 259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == " a é"
    assert tokenizer.token_bytes[ids].tolist() == [2, 1, 1, 1]


def test_a_model_that_finds_special_tokens_in_text_ends_no_document(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    vocabulary = [(piece, -1.0) for piece in pieces]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.decoder = tokenizers.decoders.ByteFallback()
    made.decoder = tokenizers.decoders.Sequence([made.decoder, tokenizers.decoders.Fuse()])
    made.add_special_tokens(pieces[:4])
    tokenizer = Tokenizer.from_bytes(made.to_str().encode())
    text = "a</s>é<s>a <pad>"
    (tmp_path / "a.txt").write_text(text)
    tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "c")
    corpus, damages = verify(tmp_path / "c")
    assert damages == []
    assert tokenizer.decode(corpus.read(0, corpus.num_tokens)) == text
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_lossy_or_broken_files_are_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    for content in (words.to_str(), "{}", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: "):
            Tokenizer.open(tmp_path / "tokenizer.json")
