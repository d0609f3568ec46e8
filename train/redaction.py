"""Secrets do not belong into logs: one function that every text passes on its way there."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "***"

_SECRET = (
    r"(?:token|secret|passw(?:or)?d|pwd|api[-_]?key|access[-_]?key|credential|signature|sig|auth)"
)
_USER_INFO = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?:[^/\s'\"]+|[^/\s'\":]*:[^\s'\"]*)@", re.I
)
_QUERY = re.compile(rf"(?P<key>[?&;][\w.-]*{_SECRET}[\w.-]*=)[^&;#\s'\"]+", re.I)
_HEADER = re.compile(r"(?P<key>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.I)
_NAME = re.compile(rf"{_SECRET}|KEY$|_DSN$", re.I)
_SHORTEST = 8  # of the values of the environment: "1" or "true" is no secret


def redact(text: str) -> str:
    """`text` without user:password@ of URIs, secret query values, and secrets of the environment.

    A variable is secret by its name: MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY, HF_TOKEN.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAME.search(name) and not os.path.isabs(value):
            text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<key>{HIDDEN}", text)
    return _HEADER.sub(rf"\g<key>{HIDDEN}", text)


def redact_logging() -> None:
    """From now on every record of Python's logging is redacted as it is made."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*arguments: Any, **more: Any) -> logging.LogRecord:
        made = make(*arguments, **more)
        made.msg, made.args = redact(made.getMessage()), ()
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


def redact_tree(value: Any) -> Any:
    """Plain data with every string in it redacted."""
    if isinstance(value, dict):
        return {key: redact_tree(one) for key, one in value.items()}
    if isinstance(value, list):
        return [redact_tree(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def revealed(value: Any, known: Any) -> Any:
    """Redacted plain data with its secrets put back, where `known` has them."""
    if isinstance(value, dict) and isinstance(known, dict):
        return {key: revealed(one, known.get(key)) for key, one in value.items()}
    if isinstance(value, list) and isinstance(known, list) and len(value) == len(known):
        return [revealed(one, other) for one, other in zip(value, known, strict=True)]
    if isinstance(value, str) and isinstance(known, str) and redact(known) == value:
        return known
    return value
