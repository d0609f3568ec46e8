"""`python -m tools.adapt`: a run whose levels go on learning as they read a text."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest
import torch

from data_pipeline import Corpus, train_tokenizer
from data_pipeline.tokenizing import tokenize
from tools.adapt import main as adapt
from tools.generate import main as generate
from train.checkpoint.load import load_run
from train.online import OnlineAdapter
from train.run import train


@pytest.mark.slow
def test_it_lowers_the_perplexity_of_a_long_held_out_document(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"training.total_tokens": 60 * 256})
    train(config, resume=False)
    run, model = load_run(config.run_dir)
    corpus = Corpus.open(run.data.validation)
    text = Path(textwrap.__file__).read_text()  # the validation document
    tokens = torch.tensor([[corpus.tokenizer.bos_id, *corpus.tokenizer.encode(text)]])
    assert tokens.shape[1] > 4000
    mean = {}
    for rate in (0.0, 0.01):
        with OnlineAdapter(model, run.model, {"b": 128, "c": 512}, lr=rate) as adapter:
            losses = adapter.feed(tokens)
            mean[rate] = (float(losses.mean()), float(losses[:, -1024:].mean()))
    assert mean[0.01][0] < mean[0.0][0] - 0.03
    assert mean[0.01][1] < mean[0.0][1] - 0.05
    file = tmp_path / "text.txt"
    file.write_text(text)
    capsys.readouterr()
    common = [str(config.run_dir), "--input", str(file), "--max-tokens", "1500", "--lr", "0.01"]
    assert adapt([*common, "--level", "b=128"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # a bar is for terminals
    rows = [line.split() for line in shown.out.splitlines()[-2:]]
    assert float(rows[1][-1]) < float(rows[0][-1])
    for bad, message in (("b", "is not of the form NAME=EVERY"), ("z=5", "no CMS level")):
        assert adapt([*common, "--level", bad]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert adapt([*common[:2], str(tmp_path), *common[3:], "--level", "b=128"]) == 2
    folder = f"error: --input {tmp_path} is a folder; name one file of text\n"
    assert capsys.readouterr().err == folder
    for more, message in (
        (["--level", "b=64"], "names 'b' twice"),
        (["--level", "c=\u00b2"], "is not of the form NAME=EVERY"),
    ):
        assert adapt([*common, "--level", "b=128", *more]) == 2, more
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert adapt([*common[:-1], "1e30", "--level", "b=128"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: adapted, lr 1e+30: the loss is not finite from token 129 on; lower --lr"
    common = [*common[:3], "--max-tokens", "300"]
    assert adapt([*common, "--level", "b=128", "--level", f"c={10**21}"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"never stepped, the text is too short: c={10**21}"
    file.write_bytes(b"caf\xe9")
    assert adapt([*common, "--level", "b=128"]) == 2
    assert f"{file} is not UTF-8: byte 3 of it" in capsys.readouterr().err
    for wrong in (["--lr", "-1"], ["--lr", "nan"], ["--max-tokens", "-5"], ["--max-tokens", "1"]):
        with pytest.raises(SystemExit) as stopped:
            adapt([*common, "--level", "b=128", *wrong])
        assert stopped.value.code == 2


def test_a_run_is_not_used_with_another_tokenizer(
    make_config, corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of equal size: nothing but its hash shows that the model's ids mean other text."""
    validation = tmp_path / "validation"
    shutil.copytree(corpora["validation"], validation)
    config = make_config(**{"data.validation": str(validation), "training.total_tokens": 4 * 256})
    train(config, resume=False)
    text = corpora["validation"].parent / "text" / "validation" / "0.txt"
    shutil.rmtree(validation)
    tokenize([str(text)], train_tokenizer([text.read_text()], 400), validation)
    capsys.readouterr()
    arguments = [str(config.run_dir), "--max-tokens", "8"]
    assert generate(arguments) == 2
    assert adapt([*arguments, "--input", str(text), "--level", "b=4"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("trained with another tokenizer" in error for error in errors)
