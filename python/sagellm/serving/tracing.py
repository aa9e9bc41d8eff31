"""Trace ids: one name for a request in answers, logs and other services."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

TRACE_HEADER = "X-Trace-Id"
_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")

current_trace_id: ContextVar[str] = ContextVar("sagellm_trace_id", default="")


def generate_trace_id() -> str:
    """Return a new trace id: 32 hexadecimal digits, unique in practice."""
    return uuid.uuid4().hex


def accept_trace_id(value: object) -> str | None:
    """Return a client's trace id if it may stand in a header and a log line, else None."""
    if isinstance(value, str) and _ACCEPTED.fullmatch(value):
        return value
    return None
