"""Secrets do not belong into logs: one function that every text passes on its way there."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_SECRET = (
    r"(?:token|secret|passw(?:or)?d|pwd|api[-_]?key|access[-_]?key|credential|signature|sig|auth)"
)
_USER_INFO = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?:[^/\s'\"]+|[^/\s'\":]*:[^\s'\"]*)@", re.I
)
_QUERY_NAME = rf"(?:[\w.-]*{_SECRET}[\w.-]*|(?:[\w.-]*[-_.])?key)"
_QUERY = re.compile(rf"(?P<key>[?&;]{_QUERY_NAME}=)[^&;#\s'\"]+", re.I)
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
