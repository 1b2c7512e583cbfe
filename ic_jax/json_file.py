"""JSON that somebody else wrote, or a kill cut short: one object, or a UserError of one line."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UserError


def parse(data: bytes, what: str | Path) -> dict:
    """The JSON object in ``data``; UserError, which begins with ``what``, when it is none, no UTF-8 or nested too deeply."""
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{what} cannot be read: it is nested too deeply") from None
    except ValueError as e:
        raise UserError(f"{what} cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} does not hold a JSON object")
    return value


def read(path: str | Path, what: str | Path | None = None) -> dict:
    """The JSON object in a file; UserError as of ``parse``, or when there is none; ``what`` is the path by default."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{what or path} cannot be read: {e.strerror or e}") from None
    return parse(data, what or path)
