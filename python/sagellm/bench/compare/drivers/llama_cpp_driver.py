"""llama.cpp: its own ``llama-bench`` and ``llama-batched-bench``, which ``bin`` of the spec holds.

Prefill and one stream are tests of llama-bench (the stream at the depth of its prompt), several
streams are rows of llama-batched-bench. Start to the first token is a whole run of llama-bench
without warm-up: a prompt of eight tokens and one token. Nothing of it samples or decodes text.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(spec: dict[str, Any], tell: Callable[..., None]) -> None:
    """Runs every case by a program of its own."""
    bench = [str(Path(spec["bin"]) / "llama-bench"), "-m", spec["model"], "-o", "jsonl"]
    bench += ["-t", str(spec["threads"]), "-r", "1"]
    facts, seconds, _ = _bench([*bench, "--no-warmup", "-p", "8", "-n", "1"])
    tell("first_token", seconds=seconds)
    for case in spec["cases"]:
        prompt, output = str(case["prompt_tokens"]), str(case["output_tokens"])
        if case["streams"] > 1:
            value, peak = _batched(spec, case)
        elif case["kind"] == "prefill":
            rows, _, peak = _bench([*bench, "-p", prompt, "-n", "0"])
            value = rows["avg_ts"]
        else:
            rows, _, peak = _bench([*bench, "-p", "0", "-n", output, "-d", prompt])
            value = rows["avg_ts"]
        tell("case", name=case["name"], value=value, peak_mb=peak)
    version = f"{facts['build_commit']} (build {facts['build_number']})"
    shown = ("model_type", "type_k", "type_v", "n_ubatch", "cpu_info")
    tell("end", facts={"version": version, **{key: facts.get(key) for key in shown}})


def _batched(spec: dict[str, Any], case: dict[str, Any]) -> tuple[float, float]:
    streams, prompt, output = (case[name] for name in ("streams", "prompt_tokens", "output_tokens"))
    tokens = streams * (prompt + output)
    command = [str(Path(spec["bin"]) / "llama-batched-bench"), "-m", spec["model"]]
    command += ["-t", str(spec["threads"]), "-c", str(tokens), "--output-format", "jsonl"]
    command += ["-npp", str(prompt), "-ntg", str(output), "-npl", str(streams)]
    lines, _, peak = _run(command)
    row = next((line for line in lines if line.get("pl") == streams), None)
    if row is None:
        raise RuntimeError(f"llama-batched-bench gave no row for {streams} streams")
    if case["kind"] == "prefill":
        return float(row["speed_pp"]), peak
    return float(row["speed_tg"]), peak


def _bench(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """The last test's row, seconds of the whole process, peak memory in MB."""
    lines, seconds, peak = _run(command)
    if not lines:
        raise RuntimeError(f"{' '.join(command)} printed no result")
    return lines[-1], seconds, peak


def _run(command: list[str]) -> tuple[list[dict[str, Any]], float, float]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
        if process.returncode != 0:
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip()[-300:]
            raise RuntimeError(f"{command[0]} ended with status {process.returncode}: {words}")
    rows = [json.loads(line) for line in lines if line.lstrip().startswith("{")]
    return rows, seconds, usage.ru_maxrss * 1024 / 1e6
