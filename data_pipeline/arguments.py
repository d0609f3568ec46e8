"""Types for the arguments of the commands; argparse says what is wrong with one."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(minimum: int, below: float = float("inf")) -> Callable[[str], int]:
    """The type of a whole number from `minimum` on, and less than `below`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        if value >= below:
            raise argparse.ArgumentTypeError(f"{value} is not below {below}")
        return value

    return number


def utf8(text: str) -> str:
    """The type of a text; bytes on the command line need not be one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text
