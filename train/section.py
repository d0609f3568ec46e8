"""What every section of the configuration has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that can't be used; the message is one line for the user."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
