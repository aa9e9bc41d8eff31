"""`bench phases`, `host`, `busy` and `shape`: the parts make up the whole."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.support import fail, succeed
from models.make_tiny import make_tiny_gguf
from sagellm import LLM
from sagellm.bench import phases
from sagellm.bench.busy import Competitor
from sagellm.bench.synthetic import SHAPES, write_model
from sagellm.checkpoint import open_checkpoint

BENCH = "sagellm.bench"
FEW = ("--repeat", "1", "--steps", "4", "--context", "20", "--threads", "2")

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", "Q8_0")


def measure(tiny: Path, **options: Any) -> list[phases.PhaseResult]:
    sizes: dict[str, Any] = {
        "streams": (1, 4),
        "context": 20,
        "prefill": 40,
        "steps": 5,
        "threads": 2,
        "repeat": 3,
    }
    return phases.run(str(tiny), **sizes | options)


def test_phases_of_a_thread_add_up_to_the_native_steps(tiny: Path) -> None:
    with LLM(tiny, device="cpu", threads=3) as llm:
        runner: Any = llm.engine.runner
        runner.time_phases(True)
        llm.generate(["one", "two", "three"])
        times = runner.phase_times()
        runner.time_phases(False)
        llm.generate("four")
        assert runner.phase_times().steps == 0
    assert times.steps > 0
    assert len(times.threads) == 3
    for thread in times.threads:
        assert sum(thread.values()) == pytest.approx(times.seconds, rel=1e-6)
        assert all(seconds >= 0 for seconds in thread.values())
    for phase in ("embed", "norm_encode", "qkv", "attention", "output", "gate_up", "down", "head"):
        assert sum(thread[phase] for thread in times.threads) > 0, phase
    assert [thread["prepare"] > 0 for thread in times.threads] == [True, False, False]


def test_phases_and_python_add_up_to_the_step(tiny: Path) -> None:
    results = measure(tiny)
    assert [r.case for r in results] == [
        "decode, 1 stream at 20",
        "decode, 4 streams at 20",
        "prefill 40",
    ]
    for r in results:
        assert sum(r.phases.values()) == pytest.approx(r.step_ms, rel=1e-6)
        assert all(value >= 0 for value in r.phases.values())
        assert len(r.runs) == 3
        assert sorted(r.runs)[1] == r.step_ms
        assert 0 < r.host_percent < 100
        assert r.probe_gbps > 0
    one, four, prefill = results
    assert (one.steps, four.steps, four.streams) == (5, 5, 4)
    assert one.attention_gbps is not None and one.attention_gbps > 0
    assert prefill.attention_gbps is None
    assert prefill.tokens_per_second == pytest.approx(40 / prefill.step_ms * 1e3)


def test_timing_phases_changes_no_answer(tiny: Path) -> None:
    with LLM(tiny, device="cpu", threads=2) as llm:
        runner: Any = llm.engine.runner
        before = llm.generate("hello")[0].output_tokens
        runner.time_phases(True)
        assert llm.generate("hello")[0].output_tokens == before


def test_the_phases_command(tiny: Path) -> None:
    command = ("phases", "--model", tiny, *FEW, "--streams", "1,2", "--prefill", "30")
    results = json.loads(succeed(*command, "--json", module=BENCH))
    assert [r["streams"] for r in results] == [1, 2, 1]
    shown = succeed(*command, module=BENCH)
    assert all(name in shown for name in ("norm_encode", "wait", "host", "prefill 30"))
    message = fail("phases", "--model", tiny, "--context", "600", module=BENCH)
    assert "context of 512; choose less context" in message


def test_the_host_command(tiny: Path) -> None:
    command = ("host", "--model", tiny, *FEW, "--streams", "3", "--blocks", "256")
    result = json.loads(succeed(*command, "--json", module=BENCH))
    assert result["allocate_free_ns"] > 0
    assert result["prefix_path_ns"] > 0
    share = 100 * (result["host_ms"] + result["sample_ms"]) / result["step_ms"]
    assert result["step_percent"] == pytest.approx(share)
    assert "at most" in succeed(*command, module=BENCH)


def test_the_busy_command(tiny: Path) -> None:
    command = ("busy", "--model", tiny, "--threads", "2", "--seconds", "0.05", "--rounds", "1")
    result = json.loads(succeed(*command, "--json", module=BENCH))
    for kind in ("free", "pinned"):
        ratio = result[f"{kind}_tps"] / result["idle_tps"]
        assert result[f"{kind}_ratio"] == pytest.approx(ratio)
        assert ratio > 0


def test_the_competitor_is_gone_when_it_is_closed() -> None:
    competitor = Competitor()
    pid = competitor.pid
    with competitor.running(os.sched_getaffinity(0)):
        assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
    competitor.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_shape_has_the_formats_of_the_real_file_and_can_be_run(tmp_path: Path) -> None:
    real = SHAPES["qwen2.5-0.5b"]
    for layer, formats in ((0, ("Q8_0", "Q6_K")), (3, ("Q5_0", "Q4_K")), (5, ("Q8_0", "Q6_K"))):
        kinds = (real.formats["attn_v"], real.formats["ffn_down"])
        assert tuple(kind(layer, 24) for kind in kinds) == formats
    assert sum(real.formats["ffn_down"](layer, 24) == "Q6_K" for layer in range(24)) == 12

    path = tmp_path / "shape.gguf"
    few = replace(
        real, vocab_size=320, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2
    )
    few = replace(few, num_kv_heads=1)
    assert write_model(path, few) == path.stat().st_size
    assert open_checkpoint(path).config.num_layers == 2
    with LLM(path, device="cpu", threads=1) as llm:
        assert llm.engine.capacity.vocab_size == 320
        assert llm.generate("abc") is not None


def test_the_shape_command_names_what_it_knows(tmp_path: Path) -> None:
    message = fail("shape", "qwen9", tmp_path / "x.gguf", module=BENCH)
    assert "no shape 'qwen9'; choose from qwen2.5-0.5b" in message
    message = fail("shape", "qwen2.5-0.5b", tmp_path / "missing" / "x.gguf", module=BENCH)
    assert "create it first" in message
