"""Measures the cases of one engine and tells them, one JSON object a line, on standard output.

``drive.py SPEC`` takes a JSON object: the ``driver`` module beside this file, the ``model``, the
``threads``, and the ``cases``, each with ``name``, ``kind`` (prefill or decode), ``streams``,
``prompt_tokens`` and ``output_tokens``. After every line it waits for one on standard input, so
that whoever started it can look at memory between two cases; when that input ends, so does this.
The line after the last event is ``again SEED`` to measure the cases once more with other prompts.

A driver module has ``load(spec)``, which returns an engine with

* ``vocab_size`` and ``generate(prompts, output_tokens)``, which runs all prompts at once and
  returns when it started, when every stream had its first token, when it ended (seconds of
  ``time.perf_counter``), and how many tokens came after the first;
* ``facts()``: what the report shall say of it;
* where known, ``bytes_per_token(streams, context)``: the bytes read for one output token.

``start_command(spec)`` of a module is a command whose time to the first output byte is the start
to the first token, instead of that of this process. A driver of programs that measure themselves
has ``measure(spec, tell)`` in place of all that.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_START_PROMPT_TOKENS = 8
_WARM_PROMPT_TOKENS = 16
_WARM_OUTPUT_TOKENS = 4
_FIRST_ID = 64  # below are byte and control tokens

Tell = Callable[..., str]
Run = Callable[[int, int, int], tuple[float, ...]]


def main() -> None:
    """Runs what the first argument says."""
    spec = json.loads(sys.argv[1])
    tell = _channel()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    module: Any = importlib.import_module(spec["driver"])
    if hasattr(module, "measure"):
        module.measure(spec, tell)
    else:
        _measure(module, spec, tell)


def _channel() -> Tell:
    """Writes one event and returns the answer; whatever libraries print goes to stderr."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(event: str, **content: object) -> str:
        events.write(json.dumps({"event": event, **content}) + "\n")
        events.flush()
        answer = sys.stdin.readline()
        if not answer:
            sys.exit(1)
        return answer

    return tell


def _measure(module: Any, spec: dict[str, Any], tell: Tell) -> None:
    seconds = None
    if hasattr(module, "start_command"):
        seconds = seconds_to_first_byte(module.start_command(spec))
        tell("first_token", seconds=seconds)
    engine = module.load(spec)
    rng = random.Random(spec["seed"])

    def run(streams: int, prompt_tokens: int, output_tokens: int) -> tuple[float, ...]:
        prompts = [
            [rng.randrange(_FIRST_ID, engine.vocab_size) for _ in range(prompt_tokens)]
            for _ in range(streams)
        ]
        return tuple(engine.generate(prompts, output_tokens))

    run(1, _START_PROMPT_TOKENS, 1)
    if seconds is None:
        tell("first_token")
    while True:
        _measure_cases(engine, run, spec["cases"], tell)
        word, _, seed = tell("end", facts=engine.facts()).strip().partition(" ")
        if word != "again":
            return
        rng.seed(int(seed))


def _measure_cases(engine: Any, run: Run, cases: list[dict[str, Any]], tell: Tell) -> None:
    for case in cases:
        streams, prompt_tokens = case["streams"], case["prompt_tokens"]
        content = {}
        if case["kind"] == "prefill":
            run(streams, prompt_tokens, 1)  # warm: buffers of this size exist
            start, first, _, _ = run(streams, prompt_tokens, 1)
            rate = streams * prompt_tokens / (first - start)
        else:
            output_tokens = case["output_tokens"]
            run(streams, _WARM_PROMPT_TOKENS, _WARM_OUTPUT_TOKENS)
            _, first, end, count = run(streams, prompt_tokens, output_tokens)
            rate = count / (end - first)
            if hasattr(engine, "bytes_per_token"):
                context = prompt_tokens + output_tokens / 2
                content["bytes_per_token"] = engine.bytes_per_token(streams, context)
        tell("case", name=case["name"], value=rate, **content)


def seconds_to_first_byte(command: list[str]) -> float:
    """From the start of a process to its first output, or to its end if it has none.

    Raises:
        RuntimeError: It failed; the message holds its last words.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, words = process.communicate()
    if process.returncode != 0:
        last = words.decode(errors="replace").strip()[-300:]
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}: {last}")
    return seconds


if __name__ == "__main__":
    main()
