"""DeepSpeed itself: imported when it is needed, and kept quiet."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from train.section import ConfigError


@contextmanager
def quiet() -> Iterator[None]:
    """What DeepSpeed prints as it begins is dropped; its log and errors go to standard error."""
    with redirect_stdout(io.StringIO()):
        yield


def open_deepspeed() -> Any:
    """The module deepspeed, over the process group there is; one is made for a single process.

    Nothing is compiled: on a CPU DeepSpeed would build a shared-memory collective at first use, a
    minute's work. Raises ConfigError where deepspeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with redirect_stdout(sys.stderr):  # its log keeps what is standard output here
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"engine=deepspeed needs the package deepspeed, which can't be imported ({error}): "
            "pip install -r requirements.txt, or engine=native"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # What the optimizer is, and which names of collectives DeepSpeed uses, is not the user's doing.
    logging.getLogger("DeepSpeed").addFilter(lambda one: "untested" not in one.getMessage())
    warnings.filterwarnings(
        "ignore", message=".*is deprecated. Please use .*_single", module="torch"
    )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    # DeepSpeed reads its place from the environment as a launcher sets it.
    for key, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(key, value)
    with quiet():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
