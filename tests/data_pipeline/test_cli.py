import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import cli
from data_pipeline.command import as_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tokenizer, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(tokenizer.model)
    return path


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "data_pipeline", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of the command in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_from_text_to_a_verified_corpus(text_folder, tmp_path):
    model, out = tmp_path / "t.model", tmp_path / "c"
    train = ("tokenizer", "train", "--input", text_folder, "--model-out", model)
    done = run(*train, "--vocab-size", 400)
    assert (done.returncode, done.stderr) == (0, "")
    assert "trained" in done.stdout
    assert "there already" in run(*train, "--vocab-size", 400).stdout
    tokenize = ("tokenize", "--input", text_folder, "--tokenizer", model, "--out", out)
    done = run(*tokenize, "--workers", 2, "--shard-bytes", 20000)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 there already" in done.stdout
    assert "0 of" in run(*tokenize, "--shard-bytes", 20000).stdout
    assert "whole" in run("verify", out).stdout
    assert "comes back exactly" in run("tokenizer", "inspect", model, "--text", "a\tb").stdout
    shown = run("inspect", out, "--samples", 2).stdout
    assert "deep/000.txt" in shown
    assert "documents by length" in shown
    assert json.loads(run("inspect", out, "--json").stdout)["documents"] == 42


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("verify nowhere", "nowhere: does not exist"),
        ("inspect nowhere", "nowhere: does not exist"),
        ("tokenizer inspect nowhere", "nowhere: cannot be read"),
        ("tokenize --input x --tokenizer {model} --out c", "x: no input file"),
        ("tokenize --input x --tokenizer y --out c", "y: cannot be read"),
        ("tokenize --input {model} --tokenizer {model} --out c", "not a type that is read"),
        ("tokenizer train --input x --model-out m --vocab-size 400", "x: no"),
        ("corpus stdlib --out c --holdout 1", "--holdout 1"),
        ("corpus stdlib --out s3://b/c", "s3://b/c: a URL"),
        ("tokenizer train --input x --model-out s3://b/m --vocab-size 400", "s3://b/m: a URL"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, monkeypatch, model, arguments, message):
    monkeypatch.chdir(model.parent)
    before = sorted(model.parent.rglob("*"))
    code, out, err = call(capsys, *arguments.format(model=model).split())
    assert code == 2
    assert out == ""
    assert err.startswith("data_pipeline: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["tokenizer"],
        ["tokenize"],
        ["tokenize", "--input", "a", "--tokenizer", "b", "--out", "c", "--workers", "0"],
        ["tokenize", "--input", "a", "--tokenizer", "b", "--out", "c", "--workers", "two"],
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, arguments):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "error:" in err


@pytest.mark.parametrize(
    "command",
    [[], ["corpus"], ["tokenizer", "train"], ["tokenizer", "inspect"], ["tokenize"], ["inspect"]],
)
def test_help(capsys, command):
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert "usage: python -m data_pipeline" in out


def test_verify_exits_with_1_on_damage(capsys, copied):
    data = bytearray((copied / "shard-00001.tok").read_bytes())
    data[100] ^= 1
    (copied / "shard-00001.tok").write_bytes(data)
    code, out, err = call(capsys, "verify", copied)
    assert (code, out) == (1, "")
    assert "shard-00001.tok: frame 0 at byte 64" in err
    assert err.count("\n") == 1


def test_a_read_only_place_is_one_line(capsys, text_folder, model):
    code, _, err = call(
        capsys, "tokenize", "--input", text_folder, "--tokenizer", model, "--out", "/proc/c"
    )
    assert code == 2
    assert err.startswith("data_pipeline: /proc/c: ")
    assert err.count("\n") == 1


def test_a_full_disk_is_one_line(text_folder, model, tmp_path):
    limited = f"ulimit -f 2; exec {sys.executable} -m data_pipeline tokenize --input {text_folder}"
    done = subprocess.run(
        ["bash", "-c", f"{limited} --tokenizer {model} --out {tmp_path / 'c'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "c").glob("*.tok"))


def test_a_full_disk_is_named_when_a_tokenizer_is_trained(text_folder, tmp_path):
    out = tmp_path / "t.model"
    limited = (
        f"ulimit -f 0; exec {sys.executable} -m data_pipeline tokenizer train --vocab-size 400"
    )
    done = subprocess.run(
        ["bash", "-c", f"{limited} --input {text_folder} --model-out {out}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert done.stderr.startswith(f"data_pipeline: {out}: File too large")


def test_nobody_reads_the_output(corpus_folder):
    command = f"{sys.executable} -m data_pipeline inspect {corpus_folder} --samples 9 | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("code", "returned", "how", "status", "shown"),
    [
        (r"print('\u2581 \xfc')", 0, "", 0, "\\u2581 \\xfc\n"),
        ("sys.stderr.write('1'); print(open('/dev/null').fileno() > 2)", 0, "2>&-", 0, "True\n"),
        ("print(1, flush=True)", 0, ">&-", 0, ""),
        ("gone.poll(); print(1)", 0, "| true", 141, ""),
        ("gone.poll(); print(1)", 75, "| true", 75, ""),
        ("gone.poll(); sys.exit(print(1))", 0, "| true", 141, ""),  # as --help does
    ],
)
def test_output_that_cannot_be_shown(code, returned, how, status, shown):
    start = "import select, sys; from data_pipeline.command import as_command"
    start += "; gone = select.poll(); gone.register(1, 0)"  # until nobody reads
    whole = f"{start}; sys.exit(as_command(lambda: exec({code!r}) or {returned}))"
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {how}; exit ${{PIPESTATUS[0]}}', sys.executable, whole],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, shown, "")


def test_files_of_other_types_are_told(text_folder, model, tmp_path):
    """In one line; what the corpus itself puts into the folder is none of them."""
    folder = tmp_path / "mixed"
    shutil.copytree(text_folder, folder)
    command = ("tokenize", "--input", folder, "--tokenizer", model, "--out", folder / "out")
    assert run(*command).stderr == ""
    assert run(*command).stderr == ""
    (folder / "b.json").write_text("{}")
    shown = run(*command).stderr
    assert shown == "warning: 1 file of other types not read: b.json\n"
    for name in ("a\udcff.md", "c.csv", "d.html"):
        (folder / name).write_text("")
    shown = run(*command).stderr
    assert shown == "warning: 4 files of other types not read: a\\xff.md, b.json, c.csv, ...\n"


@pytest.mark.parametrize(
    ("options", "module", "status", "shown"),
    [
        ([], "train.some.where", 0, "warning: no ftp://***@h is there"),
        ([], "__main__", 0, "warning: no ftp://***@h is there"),
        ([], "torch.nn", 0, "<string>:1: UserWarning: no ftp://***@h\nis there"),
        (["-W", "error"], "train.some.where", 1, "UserWarning: no ftp://me:pw@h\nis there"),
        (["-W", "ignore"], "train.some.where", 0, ""),
    ],
)
def test_warnings_of_ours_are_lines(options, module, status, shown):
    """Those of libraries have their place, and filters go before."""
    code = """
import sys, train, warnings
from importlib.machinery import ModuleSpec
from data_pipeline.command import as_command
from train.redaction import redact_logging
def main():
    redact_logging()
    name = "train.__main__" if sys.argv[1] == "__main__" else sys.argv[1]
    code = "import warnings; warnings.warn('no ftp://me:pw@h\\\\nis there', stacklevel=1)"
    exec(code, {"__name__": sys.argv[1], "__spec__": ModuleSpec(name, None)})
    return 0
sys.exit(as_command(main))
"""
    command = [sys.executable, *options, "-c", code, module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    if status:
        assert done.stderr.strip().endswith(shown)
    else:
        assert done.stderr.strip() == shown


def test_ctrl_c_is_one_line(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert as_command(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("module", ["tools.generate", "tools.quickstart"])
def test_ctrl_c_before_torch_is_there_is_one_line(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "x"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.split()[-1] == "argparse" for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    told = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert told == ["interrupted"]


def test_a_second_signal_does_not_disturb_the_tidying_up(capsys, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    tidied = []

    def verify(_):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)

    monkeypatch.setattr(cli, "_verify", verify)
    try:
        code, _, err = call(capsys, "verify", "anything")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (code, tidied) == (143, [True])
    assert err == "data_pipeline: stopped by SIGTERM; run the same command to go on\n"


def test_a_text_that_is_not_utf8_is_wrong_usage(capsys, model):
    code, _, err = call(capsys, "tokenizer", "inspect", model, "--text", "a\udcff")
    assert code == 2
    assert "'a\\udcff' is not UTF-8" in err


def test_neither_torch_nor_sentencepiece_is_imported_for_nothing():
    code = (
        "import sys, data_pipeline, data_pipeline.cli\n"
        "assert not {'torch', 'sentencepiece', 'numpy'} & set(sys.modules)\n"
        "from data_pipeline import Corpus, Loader, evaluation_batches, Tokenizer, DataError\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
