"""Runs the tests marked ``cuda``, each test function in a process of its own: an illegal access
takes the device away from the process that made it, and from no other.

``python -m gpu.run_tests --out FOLDER [--limit SECONDS] [--workers N]`` writes ``tests.json`` and
``tests.txt`` as far as the time went.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

# A warning of a newer library than the project knows is no failure of a kernel.
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
    *("-m", "cuda", "-W", "default"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one test function did.

    Attributes:
        status: ``passed`` (skips among them), ``failed``, ``stopped`` at its limit or ``not run``.
        summary: The last line of pytest.
        output: All of it, unless it passed.
    """

    name: str
    status: str
    seconds: float = 0.0
    summary: str = ""
    output: str = ""


def collect() -> tuple[list[str], str]:
    """Test functions in their order, and what pytest says of files that do not load."""
    found = subprocess.run(
        [*PYTEST, "--collect-only", "--continue-on-collection-errors", "tests/cuda"],
        capture_output=True,
        text=True,
    )
    lines = found.stdout.splitlines()
    names = [line.partition("[")[0] for line in lines if line.startswith("tests/cuda/test_")]
    errors = found.stdout[found.stdout.find("= ERRORS =") :]  # behind the names
    wrong = "" if found.returncode == 0 else errors[-6000:] + found.stderr[-2000:]
    return list(dict.fromkeys(name for name in names if "::" in name)), wrong


def run(name: str, limit: float, end: float) -> Outcome:
    """Runs one function for at most `limit` seconds, not beyond `end`."""
    start = time.monotonic()
    seconds = min(limit, end - start)
    if seconds < 1:
        return Outcome(name=name, status="not run", summary="no time was left")
    try:
        result = subprocess.run(
            [*PYTEST, "--tb=short", "-rs", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as stop:
        said = stop.stdout.decode(errors="replace") if stop.stdout else ""
        return Outcome(name=name, status="stopped", seconds=seconds, output=said)
    lines = result.stdout.strip().splitlines()
    return Outcome(
        name=name,
        status="passed" if result.returncode == 0 else "failed",
        seconds=round(time.monotonic() - start, 2),
        summary=lines[-1] if lines else f"exit status {result.returncode}",
        output="" if result.returncode == 0 else result.stdout,
    )


def write(folder: Path, outcomes: list[Outcome], wrong: str) -> None:
    """Both files, as they are now."""
    (folder / "tests.json").write_text(
        json.dumps({"collection": wrong, "tests": [asdict(outcome) for outcome in outcomes]})
    )
    parts = [f"files that do not load:\n{wrong}\n"] if wrong else []
    for outcome in outcomes:
        parts.append(
            f"{outcome.status:8}{outcome.seconds:7.1f} s  {outcome.name}  {outcome.summary}\n"
        )
    for outcome in outcomes:
        if outcome.output:
            parts.append(f"\n======== {outcome.name}\n{outcome.output[-4000:]}\n")
    (folder / "tests.txt").write_text("".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=150.0)
    parser.add_argument("--workers", type=int, default=max(1, min(6, (os.cpu_count() or 2) // 2)))
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    names, wrong = collect()
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.workers) as workers:
        futures = [workers.submit(run, name, 60.0, end) for name in names]
        for future in as_completed(futures):
            outcome = future.result()
            outcomes.append(outcome)
            if outcome.status in ("failed", "stopped"):
                print(f"{outcome.status:8} {outcome.name}  {outcome.summary}", flush=True)
            write(options.out, outcomes, wrong)
    write(options.out, outcomes, wrong)
    counts = {status: 0 for status in ("passed", "failed", "stopped", "not run")}
    for outcome in outcomes:
        counts[outcome.status] += 1
    print(f"{len(names)} test functions: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n))
    if wrong:
        print("some files do not load, see tests.txt")
    return 0 if names and not wrong and counts["passed"] == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
