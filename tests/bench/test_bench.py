"""`python -m sagellm.bench`, as a process: its contract, its errors, and what its figures mean."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.support import fail, succeed
from models.make_tiny import make_tiny_gguf
from sagellm import LLM
from sagellm.bench import report
from sagellm.bench.offline import hash_logits
from sagellm.errors import InvalidArgumentError, UnsupportedError

CONTRACT = {
    "prefill_tps": float,
    "decode_tps": float,
    "ttft_ms": float,
    "startup_s": float,
    "peak_mem_mb": int,
    "bytes_per_token": float,
    "decode_gbps": float,
    "probe_gbps": float,
    "logits_hash": str,
}
BENCH = "sagellm.bench"
SIZES = ("--prompt-tokens", "20", "--output-tokens", "6", "--repeat", "2")
SMALL = (*SIZES, "--threads", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", "Q8_0")


def offline(model: Path, *options: str, sizes: tuple[str, ...] = SMALL) -> dict[str, Any]:
    printed = succeed("offline", "--model", model, *sizes, *options, "--json", module=BENCH)
    assert printed.count("\n") == 1
    return dict(json.loads(printed))


@pytest.mark.native
def test_offline_prints_the_figures_of_the_contract(tiny: Path) -> None:
    result = offline(tiny, "--streams", "2")
    for name, kind in CONTRACT.items():
        assert isinstance(result[name], kind), name
        if kind is not str:
            assert result[name] > 0, name
    assert (result["streams"], result["threads"], result["repeat"]) == (2, 1, 2)
    assert result["decode_tps"] == pytest.approx(np.median(result["decode_runs"]))
    assert result["probe_gbps"] == pytest.approx(np.median(result["probe_runs"]))
    assert result["decode_gbps"] == pytest.approx(
        result["bytes_per_token"] * result["decode_tps"] / 1e9
    )


@pytest.mark.native
def test_bytes_per_token_are_weights_shared_by_streams_and_the_context_of_one(tiny: Path) -> None:
    with LLM(tiny, device="cpu") as llm:
        weights = llm.engine.runner.weight_bytes_per_token  # type: ignore[attr-defined]
    kv = 2 * 2 * 2 * 16 * 2 * (20 + 3)  # layers, K and V, heads, dim, bf16; mean context
    for streams in (1, 4):
        result = offline(tiny, "--streams", str(streams))
        assert result["bytes_per_token"] == weights / streams + kv


@pytest.mark.native
def test_the_logits_hash_is_that_of_the_model_and_of_nothing_else(tiny: Path) -> None:
    with LLM(tiny, device="cpu", threads=2) as llm:
        expected = hash_logits(llm.engine)
    assert offline(tiny)["logits_hash"] == expected
    assert offline(tiny, "--streams", "3", "--threads", "2")["logits_hash"] == expected
    assert offline(tiny, "--precision", "a15")["logits_hash"] != expected
    coded = offline(tiny, "--kv-dtype", "int8")
    assert coded["kv_dtype"] == "int8"
    assert coded["logits_hash"] != expected
    assert offline(tiny, "--deterministic")["logits_hash"] == expected  # as always on the CPU


def test_devices_without_the_native_core_leave_bandwidth_out(tiny: Path) -> None:
    for device in ("reference", "mock"):
        result = offline(tiny, "--device", device, sizes=SIZES)
        assert set(CONTRACT) <= set(result)
        assert result["bytes_per_token"] is None
        assert result["probe_gbps"] is None
        assert result["decode_tps"] > 0


@pytest.mark.native
def test_the_table_and_the_command_of_sagellm(tiny: Path) -> None:
    shown = succeed("bench", "offline", "--model", tiny, *SMALL)
    assert "decode_tps" in shown
    assert "logits_hash" in shown


@pytest.mark.native
def test_offline_errors(tiny: Path) -> None:
    def error(*options: str) -> str:
        return fail("offline", "--model", tiny, *options, module=BENCH)

    assert "context of 512; lower --prompt-tokens" in error("--prompt-tokens", "600")
    assert "lower --streams" in error("--prompt-tokens", "400", "--streams", "1000000")
    assert "threads is 9999" in error("--threads", "9999")
    assert "unknown device 'gpu'" in error("--device", "gpu")
    assert "no option deterministic" in error("--device", "reference", "--deterministic")
    assert "no model 'nosuch'" in fail("offline", "--model", "nosuch", module=BENCH)


@pytest.mark.native
def test_kv_prints_its_figures() -> None:
    result = json.loads(succeed("kv", "--blocks", "256", "--json", module=BENCH))
    assert result["num_blocks"] == 256
    assert result["allocate_free_ns"] > 0
    assert result["prefix_path_ns"] > 0
    assert "prefix_path_ns" in succeed("kv", "--blocks", "256", module=BENCH)


@pytest.mark.native
def test_profile_is_written_or_refused(tmp_path: Path) -> None:
    from sagellm import _core

    args = ("--profile", tmp_path / "out.prof", "kv", "--blocks", "64", "--json")
    if _core.profiler.available:
        succeed(*args, module=BENCH)
        assert (tmp_path / "out.prof").stat().st_size > 0
    else:
        assert "SAGE_ENABLE_GPERFTOOLS=1" in fail(*args, module=BENCH)


def test_plot_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'sagellm\[plot\]'"):
        report.check_plot(tmp_path / "out.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    report.check_plot(tmp_path / "out.png")
    with pytest.raises(InvalidArgumentError, match=r"out\.png"):
        report.check_plot(tmp_path / "out.pdf")
    with pytest.raises(InvalidArgumentError, match="create it first"):
        report.check_plot(tmp_path / "missing" / "out.png")


@pytest.mark.native
def test_plots_are_png_files(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    succeed("offline", "--model", tiny, *SMALL, "--plot", tmp_path / "offline.png", module=BENCH)
    assert (tmp_path / "offline.png").read_bytes().startswith(b"\x89PNG")
