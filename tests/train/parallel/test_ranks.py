"""A rank's GPU, and how it leaves its process group, with stand-ins for what needs GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from data_pipeline import DataError
from launch.checks import device_of
from tests.conftest import tiny_config
from tools.processes import run
from train import __main__ as program
from train.__main__ import main
from train.parallel.ranks import NoDeviceError, Ranks, own_device
from train.run import SAID, _said_once


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [own_device(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [own_device(rank, 1) for rank in range(3)] == [0, 0, 0]  # each is shown another one
    with pytest.raises(NoDeviceError, match="local rank 4 has no GPU of its own: there are 4 here"):
        own_device(4, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(1) == (torch.device("cuda", 1), [])
    device, problems = device_of(2)
    assert device.type == "cuda"
    assert [one.partition(":")[0] for one in problems] == ["device"]


def test_a_rank_without_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever rank it is: the first one may be elsewhere."""
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    folders = dict.fromkeys(("train", "validation"), tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config(folders, tmp_path / "run")))
    assert main([str(config)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: local rank 3 has no GPU of its own: there are 2 here")
    assert said.count("\n") == 1


@pytest.mark.parametrize("gpus", [False, True])
def test_a_rank_that_failed_waits_for_no_other(monkeypatch: pytest.MonkeyPatch, gpus: bool) -> None:
    """Destroying NCCL's groups waits for their kernels, and these for ranks that go on waiting."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted")
    )
    ranks = Ranks.alone()
    ranks.size = 2
    ranks.__exit__(None, None, None)
    ranks.__exit__(MemoryError, MemoryError(), None)
    assert done == ["destroyed", "aborted" if gpus else "destroyed"]


def found(rank: int) -> list[bool]:
    """Whether another rank has said so: what both find, and what each finds alone."""
    ranks, said = Ranks(), []
    for text in ("no such corpus", f"frame {rank} is damaged"):
        with pytest.raises(DataError, match=text) as caught, _said_once(ranks):
            raise DataError(text)
        said.append(SAID in getattr(caught.value, "__notes__", ()))
    return said


def test_what_several_ranks_find_is_said_once_and_what_one_finds_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (both, alone), (both_too, alone_too) = run(2, found)
    assert {both, both_too} == {True, False}
    assert not alone
    assert not alone_too
    monkeypatch.setenv("RANK", "1")
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(tiny_config(dict.fromkeys(("train", "validation"), tmp_path), tmp_path))
    )
    error = DataError("frame 7 is damaged")
    monkeypatch.setattr(program, "train", lambda *_: (_ for _ in ()).throw(error))
    assert main([str(config)]) == 2
    assert capsys.readouterr().err == "error: frame 7 is damaged\n"
    error.add_note(SAID)
    assert main([str(config)]) == 2
    assert capsys.readouterr().err == ""
