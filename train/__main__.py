"""python -m train CONFIG [key=value ...] [--resume | --resume-or-start]: one run.

With --dry-run --world-size N [--rank R]: say what a rank would hold and send, and train nothing.
"""

from __future__ import annotations

from train.signals import StopSignals

if __name__ == "__main__":  # at once: the imports below take seconds
    listening = StopSignals()
    listening.listen()

import argparse
import errno
import os
import sys
import time
import traceback
from functools import partial

from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from train.checkpoint import SaveError
from train.config import ConfigError, load_config
from train.corpora import open_corpora, with_vocabulary
from train.dry_run.report import print_dry_run
from train.memory import OutOfMemoryError
from train.parallel.pulse import RankLostError
from train.parallel.ranks import NoDeviceError
from train.records import NonFiniteError
from train.redaction import redact_logging
from train.run import SAID, USER_ERRORS, train
from train.watchdog import HANG

FAILED = 1
USER_ERROR = 2
CAUSE_FIRST_S = 2.0  # for the rank to end whose error it is that others lost it
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
DISK_HINT = "what was saved before is whole, and --resume goes on from it"


def main(arguments: list[str] | None = None, signals: StopSignals | None = None) -> int:
    """Exit status: 0 done; 2 bad input (one line on stderr); 128 + n on signal n, but 75 (start me
    again) on SIGUSR1 and at the walltime; 76 a rank hangs or was lost; 1 failed otherwise.

    signals: those that are listened to already; None: from the beginning of a run to its end.
    """
    options = _parse(arguments)
    redact_logging()
    if options.dry_run and signals is not None:
        signals.let_through()
    try:
        try:
            config = load_config(options.config, options.overrides)
        except ConfigError as error:  # one line a machine; the ranks don't know each other yet
            return _tell(error, USER_ERROR, int(os.environ.get("LOCAL_RANK", "0")) == 0)
        if options.dry_run:
            if config.model.vocab_size is None:
                config = with_vocabulary(config, open_corpora(config))
            print_dry_run(config, options.world_size, options.rank)
            return 0
        named = options.resume_from
        resume = options.resume or named is not None
        return train(config, resume, options.resume_or_start, named, signals)
    except SaveError as error:
        return _tell(error, FAILED)
    except USER_ERRORS as error:
        return _tell(error, USER_ERROR, SAID not in getattr(error, "__notes__", ()))
    except NoDeviceError as error:
        return _tell(error, USER_ERROR)
    except RankLostError as error:
        status = _tell(error, HANG)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # the job's status is that of the first to end
            time.sleep(CAUSE_FIRST_S)
        return status
    except (NonFiniteError, FloatingPointError, OutOfMemoryError) as error:
        return _tell(error, FAILED)
    except Exception as error:
        if options.dry_run and isinstance(error, BrokenPipeError):
            raise
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            return _tell(f"{error}; {DISK_HINT}", FAILED)
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; ends the process where they contradict one another."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a model of the Hope family from a YAML configuration.",
    )
    parser.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="e.g. optimizer.lr=3e-4 run_dir=runs/a",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir from its last checkpoint"
    )
    how.add_argument(
        "--resume-or-start",
        action="store_true",
        help="for launchers that restart: continue where run_dir has a checkpoint, else start",
    )
    parser.add_argument(
        "--resume-from",
        metavar="NAME",
        help="continue from this checkpoint, e.g. tokens-000000001048576; later ones are set aside",
    )
    how.add_argument(
        "--dry-run", action="store_true", help="say what a rank would hold and send; don't train"
    )
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the dry run")
    parser.add_argument("--rank", type=int, default=0, help="which of them it is (default 0)")
    # The deepspeed launcher passes it; LOCAL_RANK in the environment is what counts.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if not options.dry_run and (options.world_size, options.rank) != (1, 0):
        parser.error("--world-size and --rank belong to --dry-run; torchrun sets those of a run")
    if options.dry_run and options.resume_from is not None:
        parser.error("--dry-run trains nothing, and --resume-from belongs to a run")
    return options


def _tell(error: Exception | str, status: int, here: bool = True) -> int:
    if here:
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(as_command(partial(main, signals=listening)))
