"""What every section of the configuration has in common."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class ConfigError(ValueError):
    """A configuration that can't be used; the message is one line for the user."""


def expand_home(path: Any) -> Any:
    """Put the home folder in the place of a leading `~`, which no shell sees in a YAML file."""
    return os.path.expanduser(path) if isinstance(path, str) else path


LocalPath = Annotated[Path, BeforeValidator(expand_home)]
"""A local file or folder; `~` and `~user` are home folders."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
