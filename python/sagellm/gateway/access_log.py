"""One JSON line per request, written by a thread so that a slow reader cannot stall the server."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from sagellm.gateway.context import RequestContext

_MAX_WAITING = 10_000  # lines; beyond it lines are dropped and counted


def access_record(context: RequestContext) -> dict[str, Any]:
    """The fields of a log line; those without a value are left out."""
    arrived = datetime.fromtimestamp(context.arrived_at, timezone.utc)
    record: dict[str, Any] = {
        "time": arrived.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "method": context.method,
        "path": context.route,
        "status": context.status,
        "duration_ms": round((time.perf_counter() - context.started_at) * 1000, 3),
        "request_id": context.request_id,
        "trace_id": context.trace_id,
        "client_request_id": context.client_request_id,
        "client": context.client or None,
        "key": context.key_number,
        "model": context.model,
        "error": context.error,
        "prompt": context.prompt,
    }
    if context.num_prompt_tokens:
        record |= {
            "prompt_tokens": context.num_prompt_tokens,
            "cached_tokens": context.num_cached_tokens,
            "output_tokens": context.num_output_tokens,
            "finish_reasons": context.finish_reasons,
        }
    return {name: value for name, value in record.items() if value is not None}


class AccessLog:
    """Writes lines in the background; ``close`` writes what is left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Starts the writer.

        Args:
            stream: Where to; None is standard output.
        """
        self._stream = stream or sys.stdout
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_WAITING)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="sagellm-access-log", daemon=True)
        self._thread.start()

    def write(self, context: RequestContext) -> None:
        """Queues the line of a finished request."""
        try:
            self._waiting.put_nowait(access_record(context))
        except queue.Full:
            self._num_dropped += 1  # told by the next line that is written

    def close(self, timeout: float = 5.0) -> None:
        """Writes what is queued and ends; gives up on a reader that takes longer.

        Args:
            timeout: Seconds.
        """
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            dropped, self._num_dropped = self._num_dropped, 0
            if dropped:
                record["dropped_lines"] = dropped
            try:
                self._stream.write(json.dumps(record) + "\n")
                if self._waiting.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # the reader went away; requests must go on
                return
