import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import Tokenizer, cached_encoding, train_tokenizer
from data_pipeline.cached_encoding import UnitEncoder, can_cut

TEXT = st.text(st.sampled_from("ab e.\n\t\r\u00e9\U0001f600 th01" + " " * 4), max_size=200)


def processor(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


@settings(max_examples=400, deadline=None)
@given(TEXT)
def test_units_are_encoded_as_the_whole_is(tokenizer, text):
    assert tokenizer.encode(text).tolist() == processor(tokenizer).EncodeAsIds(text)


def test_real_documents_are_encoded_as_the_whole_is(tokenizer, texts):
    whole = processor(tokenizer)
    for text in texts.values():
        if "\u2581" not in text:
            assert tokenizer.encode(text).tolist() == whole.EncodeAsIds(text)
    assert isinstance(tokenizer._encode.__self__, UnitEncoder)


def pieces(tokenizer):
    return [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]


def train(texts, **changes):
    import io

    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 400,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n"],
        "byte_fallback": True,
        "max_sentence_length": 100_000,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts.values()), model_writer=model, **{**options, **changes}
    )
    return Tokenizer(model.getvalue())


def test_only_models_that_allow_it_are_cut(texts, tokenizer):
    assert can_cut(tokenizer.model, pieces(tokenizer))
    usual = train(texts)
    assert can_cut(usual.model, pieces(usual))
    for piece in ("a\u2581", "a\u2581b", "\u2581a\u2581", "\n\n", "a\n", "\n\u2581"):
        assert not can_cut(tokenizer.model, [*pieces(tokenizer), piece])
    for change in (
        {"model_type": "unigram"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["\n\n"]},
    ):
        other = train(texts, **change)
        assert not can_cut(other.model, pieces(other)), change
        assert other.encode("a b  c").tolist() == processor(other).EncodeAsIds("a b  c")


def test_the_memory_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(cached_encoding, "_REMEMBERED", 10)
    encoder = UnitEncoder(processor(tokenizer))
    for number in range(100):
        text = f" w{number} " + "x" * 200
        assert encoder.encode(text).tolist() == processor(tokenizer).EncodeAsIds(text)
        assert len(encoder) <= 10


def test_a_model_of_another_kind_still_comes_back(texts):
    unigram = train_tokenizer(texts.values(), 400, "unigram")
    assert not can_cut(unigram.model, pieces(unigram))
