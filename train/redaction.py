"""What Python writes by itself, and plain data, without secrets (`data_pipeline.redaction`)."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from data_pipeline.redaction import redact


def redact_logging() -> None:
    """From now on every record of Python's logging is redacted as it is made, and every warning as
    it is written."""
    make, write = logging.getLogRecordFactory(), warnings.formatwarning
    if getattr(make, "redacts", False):
        return

    def record(*arguments: Any, **more: Any) -> logging.LogRecord:
        made = make(*arguments, **more)
        made.msg, made.args = redact(made.getMessage()), ()
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *told, **more: redact(write(*told, **more))


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
