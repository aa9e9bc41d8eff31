"""Logging with trace ids, on the standard `logging` module."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, TextIO

from sagellm.errors import InvalidArgumentError
from sagellm.serving.environment import env
from sagellm.serving.tracing import current_trace_id

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _trace_id(record: logging.LogRecord) -> str:
    return str(getattr(record, "trace_id", "") or current_trace_id.get())


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """One line a record; line breaks inside a message are escaped, so that none can be forged."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a traceback follows on its own lines."""
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        trace_id = _trace_id(record)
        place = f"{record.name} [{trace_id}]" if trace_id else record.name
        text = f"{_timestamp(record)} {record.levelname} {place} {message}"
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        fields: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace_id := _trace_id(record):
            fields["trace_id"] = trace_id
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


_FORMATTERS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


class Log:
    """The log of a service.

    Records carry the trace id given to `get_logger`, else that of the request being served.
    """

    def get_logger(
        self, trace_id: str | None = None, name: str = "sagellm.app"
    ) -> logging.LoggerAdapter[logging.Logger]:
        """Return a logger whose records carry `trace_id`."""
        return logging.LoggerAdapter(logging.getLogger(name), {"trace_id": trace_id or ""})

    def debug(self, message: str, *arguments: object) -> None:
        """Log for developers."""
        self.get_logger().debug(message, *arguments, stacklevel=2)

    def info(self, message: str, *arguments: object) -> None:
        """Log an event."""
        self.get_logger().info(message, *arguments, stacklevel=2)

    def warning(self, message: str, *arguments: object) -> None:
        """Log what an operator may have to look at."""
        self.get_logger().warning(message, *arguments, stacklevel=2)

    def error(self, message: str, *arguments: object) -> None:
        """Log a failure."""
        self.get_logger().error(message, *arguments, stacklevel=2)

    def exception(self, message: str, *arguments: object) -> None:
        """Log a failure with the traceback of the exception at hand."""
        self.get_logger().error(message, *arguments, exc_info=True, stacklevel=2)

    def configure(
        self,
        level: str | None = None,
        format: str | None = None,
        stream: TextIO | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Send all logs to `stream`, unless logging is set up already.

        Args:
            level: the least level shown; LOG_LEVEL by default.
            format: "text" or "json"; LOG_FORMAT by default.
            stream: stderr by default.
            force: replace what is set up.

        Raises:
            InvalidArgumentError: no such level or format.
        """
        level = (level or env.log.level).upper()
        format = (format or env.log.format).lower()
        if level not in _LEVELS:
            raise InvalidArgumentError(f"LOG_LEVEL is {level!r}: use one of {', '.join(_LEVELS)}")
        if format not in _FORMATTERS:
            raise InvalidArgumentError(f"LOG_FORMAT is {format!r}: use text or json")
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_FORMATTERS[format]())
        logging.basicConfig(level=level, handlers=[handler], force=force)


log = Log()
