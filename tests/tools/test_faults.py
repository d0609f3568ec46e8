"""The rehearsal of faults is a run of minutes; here is what it takes."""

from __future__ import annotations

import pytest

from tools.faults import main


@pytest.mark.parametrize(
    "arguments",
    [["--soak", "-1"], ["--soak", "nan"], ["--soak", "0"], ["--seeds", "0"], ["--ranks", "0"]],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"error: argument {arguments[0]}" in capsys.readouterr().err
