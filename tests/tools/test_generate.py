"""What `python -m tools.generate` writes, as it comes."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import pytest
import sentencepiece
import torch

from data_pipeline.tokenizer import Tokenizer
from hope import HopeConfig, HopeModel
from tools.generate import main as generate
from tools.generate import texts


def tokenizer_of(text: str, **options: object) -> Tokenizer:
    """By default as Llama's: bytes for what it lacks, a space before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([text]),
        model_writer=model,
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return Tokenizer(model.getvalue())


def tiny(tokenizer: Tokenizer) -> HopeModel:
    return HopeModel(HopeConfig(vocab_size=tokenizer.vocab_size, dim=8, num_layers=1, num_heads=1))


def test_what_is_generated_keeps_the_space_that_it_begins_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizers that put a space before a text, as Llama's does, take one away from a text."""
    tokenizer = tokenizer_of("to be or not to be")
    hope = tiny(tokenizer)
    written = torch.from_numpy(tokenizer.encode("or not"))
    monkeypatch.setattr("tools.generate.load_run_and_tokenizer", lambda _: (None, hope, tokenizer))
    monkeypatch.setattr("tools.generate.sample", lambda *_, **__: iter(written.tolist()))
    for prompt, expected in (
        ("to be", "to be or not"),
        ("", "or not"),
    ):
        assert generate(["run", "--prompt", prompt]) == 0
        assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_the_texts_of_tokens_are_the_text_of_all(add_dummy_prefix: bool) -> None:
    """Of any tokens: with characters of several bytes, halves of such, and ids of no text."""
    tokenizer = tokenizer_of("to be or not to be, \u00fcber", add_dummy_prefix=add_dummy_prefix)
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(40))]
        ids += tokenizer.encode(draw.choice(["\U0001f642 caf\u00e9\n", "  x", ""])).tolist()
        prompt = [tokenizer.bos_id, *tokenizer.encode("to be").tolist()]
        before = tokenizer.decode(prompt)
        assert before + "".join(texts(tokenizer, prompt, ids)) == tokenizer.decode([*prompt, *ids])


def test_a_text_is_written_as_its_tokens_come() -> None:
    tokenizer = tokenizer_of("to be or not to be")
    prompt, written = [tokenizer.bos_id], tokenizer.encode("or \U0001f642!").tolist()
    chosen = []

    def choose() -> Iterator[int]:
        for token in written:
            chosen.append(token)
            yield token

    for text in texts(tokenizer, prompt, choose()):
        if "\U0001f642" in text:  # the last of its bytes, and no sooner or later
            assert chosen == written[: len(chosen)]
            assert written[len(chosen) :] == tokenizer.encode("!").tolist()[-1:]
            break
    else:
        raise AssertionError("never written")
