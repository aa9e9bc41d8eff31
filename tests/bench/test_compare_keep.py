"""`bench compare --keep`: processes that live from round to round, stopped in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.test_compare import CASES, NAMES, entrant, plan_of
from bench.test_machine import lives
from sagellm.bench.compare import figures
from sagellm.bench.compare import plan as planned
from sagellm.bench.compare.plan import MEMORY, START, Entrant, Plan
from sagellm.bench.compare.run import Comparison
from sagellm.bench.compare.run import run as compare

# A driver with a worker. It writes its turns into one file, and the pids of
# every start into another; the driver "looks" tells their states, "kills" ends the last in round 2.
DRIVER = """
import json, os, pathlib, signal, subprocess, sys
spec = json.loads(sys.argv[1])
what, seed, turns = spec["driver"], spec["seed"], pathlib.Path(spec["model"])
pids = turns.with_name("pids")

def tell(event, **content):
    print(json.dumps({"event": event, **content}), flush=True)
    return sys.stdin.readline()

def state(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return state.strip("ZX")

if what in ("looks", "kills"):
    seen = [int(pid) for pid in pids.read_text().split()]
    facts = {"states": [state(pid) for pid in seen]}
    if what == "kills" and seed == 1:
        os.kill(seen[-2], signal.SIGKILL)
else:
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    worker = subprocess.Popen(sleep, stdout=subprocess.DEVNULL)
    with pids.open("a") as log:
        log.write(f"{os.getpid()} {worker.pid}\\n")
    facts = {}
tell("first_token")
while True:
    with turns.open("a") as log:
        log.write(f"{what} {seed}\\n")
    for case in spec["cases"]:
        if what == "fails" and seed == 1:
            sys.exit("the second turn is too much")
        tell("case", name=case["name"], value=100.0 + seed)
    word, _, seed = tell("end", facts=facts).strip().partition(" ")
    if word != "again":
        break
    seed = int(seed)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    return script


def plan(driver: Path, *, kept: str = "works", other: str = "looks", timeout_s: float = 60) -> Plan:
    entrants = [entrant(driver, "peer", kept, keep=True), entrant(driver, "sagellm", other)]
    return plan_of(entrants, rounds=3, timeout_s=timeout_s)


def measure(
    plan: Plan,
    say: Callable[[str], None] = lambda words: None,
    save: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
    return compare(plan, say=say, save=save)


def starts(driver: Path) -> list[list[int]]:
    """Driver and worker of every start."""
    lines = driver.with_name("pids").read_text().splitlines()
    return [[int(pid) for pid in line.split()] for line in lines]


def test_a_kept_peer_starts_once_and_is_stopped_while_others_are_measured(driver: Path) -> None:
    chosen = plan(driver)
    result = measure(chosen)
    turns = driver.with_name("turns").read_text().split("\n")[:6]
    assert turns == ["works 0", "looks 0", "looks 1", "works 1", "works 2", "looks 2"]
    (pids,) = starts(driver)
    theirs = [one for one in result.measurements if one.engine == "peer"]
    assert [one.failure for one in result.measurements] == [None] * 6
    assert list(theirs[0].values) == [START, NAMES[0], MEMORY, *NAMES[1:]]
    assert [list(one.values) for one in theirs[1:]] == [NAMES, NAMES]
    assert [one.values[NAMES[0]] for one in theirs] == [100, 101, 102]
    seen = [one.facts["states"] for one in result.measurements if one.engine == "sagellm"]
    assert seen == [["T", "T"], ["T", "T"], ["", ""]]  # it has had its last turn
    assert not any(map(lives, pids))
    rows = {row.name: row for row in figures.rows(result, chosen.groups[0])}
    assert len(rows[START].figures["peer F32"].runs) == 1
    assert rows[START].ratio is not None
    assert len(rows[NAMES[0]].figures["peer F32"].runs) == 3
    assert any("peer F32 was kept from round to round" in one for one in figures.notes(result))


def test_a_kept_peer_that_dies_is_started_anew(driver: Path) -> None:
    result = measure(plan(driver, other="kills"))
    assert [one.failure for one in result.measurements] == [None] * 6
    first, second = starts(driver)
    theirs = [one for one in result.measurements if one.engine == "peer"]
    assert [START in one.values for one in theirs] == [True, True, False]
    assert not any(map(lives, second))
    assert not lives(first[0])
    assert not lives(first[1])


def test_a_kept_peer_that_fails_is_ended_and_tried_again(driver: Path) -> None:
    result = measure(plan(driver, kept="fails"))
    theirs = [one for one in result.measurements if one.engine == "peer"]
    assert [one.failure is None for one in theirs] == [True, False, True]
    assert "status 1: the second turn is too much" in (theirs[1].failure or "")
    assert len(starts(driver)) == 2
    assert not any(lives(pid) for pids in starts(driver) for pid in pids)


def test_an_interruption_ends_what_is_stopped(driver: Path) -> None:
    def interrupt(words: str) -> None:
        if words == "round 2 of 3, sagellm F32: starting":
            assert all(map(lives, *starts(driver)))
            raise KeyboardInterrupt

    result = measure(plan(driver), say=interrupt)
    assert result.interrupted
    assert len(result.measurements) == 2
    assert not any(map(lives, *starts(driver)))


def test_the_timeout_is_that_of_a_turn(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def pass_time(comparison: Comparison) -> None:
        clock[0] += 900

    monkeypatch.setattr(
        "sagellm.bench.compare.driver_process.time", SimpleNamespace(monotonic=lambda: clock[0])
    )
    result = measure(plan(driver, timeout_s=1000), save=pass_time)
    assert [one.failure for one in result.measurements] == [None] * 6
    assert len(starts(driver)) == 1


ENGINE = """
import pathlib

def load(spec):
    log = pathlib.Path(spec["model"])
    log.open("a").write("load\\n")
    return Engine(log)

class Engine:
    vocab_size = 1000

    def __init__(self, log):
        self.log = log

    def generate(self, prompts, output_tokens):
        self.log.open("a").write(f"{prompts}\\n")
        return 0.0, 1.0, 2.0, 10

    def facts(self):
        return {}
"""


def test_the_driver_script_loads_once_and_takes_new_prompts_each_turn(tmp_path: Path) -> None:
    (tmp_path / "engine_of_test.py").write_text(ENGINE)
    script = Path(planned.__file__).parent / "drivers" / "drive.py"
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    peer = Entrant(
        engine="peer",
        label="F32",
        model=str(tmp_path / "log"),
        command=(sys.executable, "-c", program),
        driver="engine_of_test",
        keep=True,
    )
    result = measure(plan_of([peer], rounds=3))
    assert [one.failure for one in result.measurements] == [None] * 3
    assert [one.values[NAMES[0]] for one in result.measurements] == [10, 10, 10]
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.count("load") == 1
    prompts = lines[1:]
    assert len(prompts) == 1 + 3 * 2 * len(CASES)
    assert len(set(prompts)) == len(prompts)
