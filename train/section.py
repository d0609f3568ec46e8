"""What every section of the configuration has in common."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """A configuration that can't be used; the message is one line for the user."""


def expand_home(path: Any) -> Any:
    """Put the home folder in the place of a leading `~`, which no shell sees in a YAML file."""
    return os.path.expanduser(path) if isinstance(path, str) else path


def _local(path: Any) -> Any:
    if isinstance(path, str) and "://" in path:
        raise PydanticCustomError("local_path", "input should be on this machine, not a URL")
    return expand_home(path)


LocalPath = Annotated[Path, BeforeValidator(_local)]
"""A local file or folder; `~` and `~user` are home folders."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
