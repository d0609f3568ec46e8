"""The run folder: one writer at a time, and a resume that is the run it claims to be."""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from data_pipeline.redaction import redact
from train.checkpoint.errors import CheckpointError
from train.checkpoint.levels import describe_levels, map_levels
from train.checkpoint.manifest import MARKER
from train.checkpoint.places import Place, as_place, make_folder, read, write
from train.checkpoint.retention import complete
from train.config import ConfigError, RunConfig, dump_config, flatten, load_config
from train.line_file import write_whole
from train.optim.config import LevelOptimizerConfig
from train.optim.levels import periods
from train.parallel.ranks import Ranks
from train.run_files import CHECKPOINTS, CONFIG, METRICS, MLFLOW_BACKLOG, MLFLOW_RUN_ID, MLFLOW_SENT

LOCK = ".lock"
JOB = ".job"
WENT_BACK = ".went_back"
OWNER = ".owner"

# May differ between a run and its resumption: none of them changes what is computed, but for
# what is done about steps that went wrong.
FREE_SECTIONS = (
    *("run_dir", "num_threads", "evaluation", "checkpoint", "mlflow", "parallel"),
    *("engine", "deepspeed", "spikes", "watchdog", "profiler", "faults"),
)
FREE_KEYS = (
    "training.stop_at_tokens",
    "training.flush",
    "training.max_skipped_in_a_row",
    "training.peak_tflops",
    "training.walltime_s",
    "training.walltime_margin_s",
    "data.prefetch",
    "data.on_corrupt",
    "data.cache_dir",
    "data.cache_bytes",
    "model.titans.scan.implementation",
    "model.titans.scan.checkpoint_chunks",
    "model.attention.backend",
)
# How accumulators are kept, for all levels or one; the levels, which are mapped by name; and where
# the data lies: what it holds stands in the loader's state.
FREE_PATTERN = re.compile(
    r"optimizer\.(levels\.\w+\.)?(reduce|accumulator_device)|model\.cms\.(mode$|levels\.)"
    r"|data\.(train\.\d+\.(path|validation)|validation)$"
)


class RunFolderError(RuntimeError):
    """A run folder that can't be used for what was asked; the message is one line."""


def no_run(folder: Path) -> RunFolderError:
    return RunFolderError(f"nothing to resume: {folder} holds no run ({CONFIG} missing)")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; RunFolderError when another one has it."""
    lock = _locked(folder)
    while os.fstat(lock).st_nlink == 0:  # a run that did not begin took it away meanwhile
        os.close(lock)
        lock = _locked(folder)
    try:
        yield
    finally:
        os.close(lock)


def _locked(folder: Path) -> int:
    """The folder's lock file, open and ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"can't write to run folder {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunFolderError(
            f"{folder} is in use by another training process; wait for it or choose another run_dir"
        ) from None
    return lock


@contextmanager
def claim(config: RunConfig, ranks: Ranks, resume: bool, auto: bool) -> Iterator[bool]:
    """Hold the run folder for all ranks; yields whether its run is to be continued.

    auto: continue it if it has a checkpoint, begin it if not. A restart by torchrun of what this
    very job began is always `auto`. Raises RunFolderError, on every rank, when another job holds
    the folder or it has a run that is not to be continued. A new folder into which nothing was
    written until the end goes again.
    """
    folder, refused = config.run_dir, None
    with ExitStack() as stack:
        if ranks.is_first:
            try:
                if resume and not folder.exists():  # a slip in run_dir makes no folder
                    raise no_run(folder)
                new = not folder.exists()
                stack.enter_context(run_lock(folder))
                if new:
                    stack.callback(_unmake, folder)
                resume = continues(config, resume, auto)
                if resume:
                    if accepted := check_same_run(config):
                        settings = ", ".join(accepted)
                        print(redact(f"resuming with other settings: {settings}"), file=sys.stderr)
                    check_begun(folder, config.checkpoint.url)
                else:
                    check_fresh(folder, config.checkpoint.url)
                if config.checkpoint.url is not None:
                    own_url(folder, config.checkpoint.url)
                write_whole(folder / JOB, _job())
            except (RunFolderError, CheckpointError) as error:
                refused = str(error)
            except OSError as error:
                refused = f"can't write to run folder {folder}: {error.strerror}"
        refused, resume = ranks.broadcast((refused, resume))
        if refused is not None:
            raise RunFolderError(refused)
        yield resume


def _unmake(folder: Path) -> None:
    """Remove the folder of a run that ended before it wrote anything; held by its lock."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {LOCK, JOB}:
            (folder / JOB).unlink(missing_ok=True)
            (folder / LOCK).unlink()
            folder.rmdir()


def continues(config: RunConfig, resume: bool, auto: bool) -> bool:
    """Whether the run of a folder is to be continued, by what was asked for and what is there."""
    if resume or not (auto or _restarted(config.run_dir)):
        return resume
    return _has_checkpoints(as_place(config.checkpoint.url or config.run_dir / CHECKPOINTS))


def _has_checkpoints(place: Place) -> bool:
    with _reaching(place):
        return bool(complete(place))


@contextmanager
def _reaching(place: Place) -> Iterator[None]:
    """An OSError, such as a URL gives that does not answer, as a RunFolderError that names it."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"can't use {place}: {error.strerror or error}") from None


def _job() -> str:
    """What names this job, the same in all its restarts by torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"child of process {os.getppid()}"


def _started_again(*counts: str) -> bool:
    """Whether any of these counts of starts in the environment is above 0."""
    return any(int(os.environ.get(count, "0")) > 0 for count in counts)


def _restarted(folder: Path) -> bool:
    """Whether torchrun started this process again, after the same job had taken the folder."""
    again = _started_again("TORCHELASTIC_RESTART_COUNT")
    return again and (folder / JOB).exists() and (folder / JOB).read_text() == _job()


def goes_back_to(folder: Path, name: str | None, ranks: Ranks) -> str | None:
    """The checkpoint that a run is to be resumed from: None, the newest, where `name` is None or
    an earlier start of this very job, by torchrun or Slurm, has gone back to it already."""
    if name is None:
        return None
    done = False
    if ranks.is_first and (folder / WENT_BACK).exists():
        again = _started_again("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        done = again and (folder / WENT_BACK).read_text() == _went_back(name)
    return None if ranks.broadcast(done) else name


def went_back(folder: Path, name: str) -> None:
    """Note that this job has taken up the checkpoint of that name."""
    write_whole(folder / WENT_BACK, _went_back(name))


def _went_back(name: str) -> str:
    return f"{os.environ.get('SLURM_JOB_ID') or _job()} {name}"


def check_fresh(folder: Path, url: str | None = None) -> None:
    """Raises RunFolderError when the folder already holds a checkpoint, or `url`, where the run's
    are to go; clears what is left of a run that never reached one."""
    if any((folder / CHECKPOINTS).glob(f"*/{MARKER}")):
        raise RunFolderError(
            f"{folder} already holds a run; add --resume to continue it, or choose another run_dir"
        )
    if url is not None and _has_checkpoints(as_place(url)):
        raise RunFolderError(f"{url} already holds checkpoints; choose another checkpoint.url")
    before = _saved_url(folder)
    if before not in (None, url) and _has_checkpoints(as_place(before)):
        raise RunFolderError(
            f"{folder} already holds a run, with its checkpoints under {before}; add --resume and "
            "that checkpoint.url to continue it, or choose another run_dir"
        )
    for leftover in (METRICS, MLFLOW_RUN_ID, MLFLOW_BACKLOG, MLFLOW_SENT):
        (folder / leftover).unlink(missing_ok=True)


def check_begun(folder: Path, url: str | None) -> None:
    """Raises RunFolderError when the run of a folder has no checkpoint, damaged or not."""
    if not _has_checkpoints(as_place(url or folder / CHECKPOINTS)):
        raise RunFolderError(
            f"nothing to resume: {url or folder / CHECKPOINTS} holds no checkpoint; begin the run "
            "again without --resume, or say --resume-or-start"
        )


def _saved_url(folder: Path) -> str | None:
    """Where the run of a folder had its checkpoints, if behind a URL."""
    try:
        return load_config(folder / CONFIG).checkpoint.url
    except ConfigError:  # none there, or one that nothing can be resumed with
        return None


def own_url(folder: Path, url: str) -> None:
    """Note in the folder behind `url` that the run in `folder` writes there; RunFolderError where
    another one does, complete checkpoints or not, or the folder that this one is a copy of."""
    mine = folder / OWNER
    if not mine.exists():
        write_whole(mine, uuid4().hex)
    run, place = mine.read_text(), as_place(url)
    with _reaching(place):
        there = owner_of(place)
        if there is None:
            make_folder(place)
        elif there[0] != run:
            raise RunFolderError(
                f"{url} takes the checkpoints of another run; choose another checkpoint.url (or, "
                f"if that run is gone, remove {OWNER} there)"
            )
        elif (first := run_folder_of(there)) is not None and not first.samefile(folder):
            raise RunFolderError(
                f"{url} takes the checkpoints of {first}, which {folder} is a copy of; choose "
                f"another checkpoint.url (or, if {first} is out of use, remove {OWNER} in it)"
            )
        if there != (run, str(folder.resolve())):
            write(place / OWNER, [f"{run}\n{folder.resolve()}".encode()])


def owner_of(place: Place) -> tuple[str, str] | None:
    """The run that writes behind a URL, and its folder where that was noted ("" if not); None where
    none does."""
    try:
        run, _, folder = read(place / OWNER).decode("utf-8", "replace").partition("\n")
    except FileNotFoundError:
        return None
    return run, folder


def run_folder_of(owner: tuple[str, str] | None) -> Path | None:
    """The folder of a run that writes behind a URL (`owner_of`), where this machine has it."""
    if owner is None or not owner[1]:
        return None
    folder = Path(owner[1])
    try:
        return folder if (folder / OWNER).read_text() == owner[0] else None
    except (OSError, ValueError):
        return None


def check_same_run(config: RunConfig) -> list[str]:
    """The settings in which `config` differs from the run in its folder, without changing what it
    computes. Raises RunFolderError, with the list of keys, when it would not continue that run.

    Levels may be added and change their periods, as `train.checkpoint.levels` says; rows read in
    shuffled order may come in batches of another size; where no learning rate depends on the end,
    it may be elsewhere.
    """
    path = config.run_dir / CONFIG
    if not path.exists():
        raise no_run(config.run_dir)
    try:
        saved = load_config(path)
    except ConfigError as error:
        raise RunFolderError(f"the saved configuration can't be used: {error}") from None
    try:
        added = map_levels(describe_levels(saved.model.cms), config.model.cms).added
    except ValueError as error:
        raise RunFolderError(f"{config.run_dir} can't be resumed: {error}") from None
    before, now = _settings(saved), _settings(config)
    free = {f"optimizer.levels.{name}" for name in added}
    if config.data.order != "stream":
        free.add("training.batch_tokens")
    if _goes_on(saved) and _goes_on(config):
        free.add("training.total_tokens")
    changed: list[str] = []
    accepted: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            change = f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
            (accepted if _is_free(key, free) else changed).append(change)
    if changed:
        raise RunFolderError(
            f"{config.run_dir} was trained with another configuration: {', '.join(changed)}; "
            "resume with the saved one or choose another run_dir"
        )
    return accepted


def _settings(config: RunConfig) -> dict[str, Any]:
    """A configuration by dotted keys, every level with all of its settings, named or not."""
    tree = config.model_dump(mode="json")
    for name in periods(config.model):
        tree["optimizer"]["levels"].setdefault(name, LevelOptimizerConfig().model_dump(mode="json"))
    return flatten(tree)


def _goes_on(config: RunConfig) -> bool:
    """Whether what a run computes does not depend on where it ends."""
    names = periods(config.model)
    constant = all(config.optimizer.level(name).schedule.name == "constant" for name in names)
    return constant and config.mode == "pretrain" and not config.training.flush


def _is_free(key: str, free: set[str]) -> bool:
    """Whether a resume may change `key`; `free` names further keys, or sections of them."""
    return (
        key.split(".")[0] in FREE_SECTIONS
        or key in FREE_KEYS
        or FREE_PATTERN.match(key) is not None
        or any(key == one or key.startswith(f"{one}.") for one in free)
    )


def save_config(config: RunConfig) -> None:
    """Write the resolved configuration into the run folder."""
    write_whole(config.run_dir / CONFIG, dump_config(config))
