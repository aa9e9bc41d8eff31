"""`bench kernels`: every kernel is timed, and its figures are those of one roofline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.support import fail, succeed
from sagellm.bench.kernel_cases import FORMATS, HEADS, KERNELS, Case, Selection, cases, count
from sagellm.bench.kernels import Roofs, run
from sagellm.bench.synthetic import random_matrix
from sagellm.errors import InvalidArgumentError
from sagellm.native import load_core

BENCH = "sagellm.bench"
TINY = ("--seconds", "0.001", "--working-set", "1", "--rows", "64", "--columns", "256")

pytestmark = pytest.mark.native


def small(**fields: Any) -> Selection:
    sizes: dict[str, Any] = {
        "threads": (1, 2),
        "rows": 64,
        "columns": 256,
        "tokens": (1, 5),
        "contexts": (40,),
        "prompts": (24,),
        "widths": (64,),
        "vocabularies": (320,),
        "working_set": 1 << 16,
    }
    return Selection(**sizes | fields)


def test_every_kernel_format_and_shape_is_timed() -> None:
    results = run(small(), seconds=0.001)
    assert len(results) == count(small())
    assert {r.kernel for r in results} == set(KERNELS)
    for team in (1, 2):
        names = [r.case for r in results if r.threads == team]
        assert len({(r.kernel, r.case) for r in results if r.threads == team}) == len(names)
        for name in FORMATS:
            assert sum(case.startswith(f"{name} [64, 256]") for case in names) == 2
        for name in HEADS:
            assert {f"{name} bf16 decode 40", f"{name} int8 prefill 24"} <= set(names)
    for r in results:
        figures = (r.microseconds, r.best_microseconds, r.gbps, r.gops, r.peak, r.peak_percent)
        assert all(math.isfinite(figure) and figure > 0 for figure in figures), r
        assert r.best_microseconds <= r.microseconds
        assert r.rounds >= 3


def test_the_larger_of_two_times_binds() -> None:
    roofs = Roofs(load_core().kernels.selected_isa(), 0.001, 1 << 20)
    instruction, ops = roofs.arithmetic("f32", 1)

    def case(bytes: int, ops: int) -> Case:
        return Case(
            kernel="k",
            case="c",
            threads=1,
            bytes=bytes,
            ops=ops,
            arithmetic="f32",
            level="cache",
            time=lambda seconds: {},
        )

    much = roofs.bound(case(bytes=1, ops=10**9))
    assert (much.name, much.peak) == (instruction, ops)
    assert much.seconds == pytest.approx(1e9 / ops)
    wide = roofs.bound(case(bytes=10**9, ops=1))
    assert (wide.name, wide.peak) == ("cache", roofs.cache(1))
    assert wide.seconds == pytest.approx(1e9 / roofs.cache(1))


def test_bytes_and_operations_are_those_of_the_problem() -> None:
    isa = load_core().kernels.selected_isa()
    by_name = {c.case: c for c in cases(small(threads=(1,)), isa)}
    matmul = by_name["Q8_0 [64, 256] x 5"]
    assert (matmul.bytes, matmul.ops) == (64 * 256 // 32 * 34, 2 * 64 * 256 * 5)
    decode = by_name["SmolLM2-135M bf16 decode 40"]
    assert (decode.bytes, decode.ops) == (3 * 40 * 64 * 2 * 2, 4 * 9 * 64 * 40)
    prefill = by_name["SmolLM2-135M bf16 prefill 24"]
    assert prefill.ops == 4 * 9 * 64 * sum(range(1, 25))


@pytest.mark.parametrize("arithmetic", ("f32", "bf16", "i8"))
def test_probes_of_every_instruction_set_are_positive(arithmetic: str) -> None:
    kernels = load_core().kernels
    for isa in kernels.available_isas():
        peak = kernels.arithmetic_peak(isa, arithmetic, 1, 0.001)
        assert peak["ops_per_second"] > 0
        assert peak["instruction"]
        assert kernels.cache_bandwidth(isa, 1, 0.001) > 0
        assert kernels.memory_bandwidth(isa, 1, 4 << 20, 0.001) > 0
    with pytest.raises(ValueError, match="arithmetic is 'i7'"):
        kernels.arithmetic_peak("generic", "i7", 1, 0.001)
    with pytest.raises(ValueError, match="seconds is 0"):
        kernels.arithmetic_peak("generic", "i8", 1, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_are_finite_and_of_the_right_size(name: str) -> None:
    raw = random_matrix(name, 16, 512, np.random.default_rng(0))
    values = load_core().quant.dequantize(name, np.ascontiguousarray(raw).reshape(-1), 16 * 512)
    assert np.isfinite(values).all()
    assert 0.1 < float(np.std(values)) * math.sqrt(512) < 3
    with pytest.raises(InvalidArgumentError, match="no random weights in format 'Q2_K'"):
        random_matrix("Q2_K", 16, 512, np.random.default_rng(0))


def test_the_command_selects_kernels_and_forces_an_instruction_set() -> None:
    options = ("--only", "matmul,rope", "--threads", "1", "--tokens", "1,3", "--formats", "q4_1")
    printed = succeed("kernels", *options, *TINY, "--json", module=BENCH, SAGELLM_CPU_ISA="generic")
    results = json.loads(printed)
    assert [r["kernel"] for r in results] == ["matmul", "matmul", "rope", "rope"]
    assert [r["case"] for r in results[:2]] == ["Q4_1 [64, 256] x 1", "Q4_1 [64, 256] x 3"]
    assert {r["isa"] for r in results} == {"generic"}


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--only", "rms_norm,kv_write", "--quick", *TINY, "--plot", tmp_path / "roof.png")
    printed = succeed("kernels", *options, module=BENCH)
    assert "rms_norm" in printed
    assert "% of peak" in printed
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--only", "matmul,fft"), "no kernel fft; choose from matmul"),
        (("--tokens", "1,x"), "--tokens is '1,x'; give numbers"),
        (("--contexts", "0"), "--contexts is '0'; give numbers"),
        (("--formats", "Q9"), "no random weights in format 'Q9'; choose from Q4_0"),
        (("--formats", "Q4_K", "--columns", "288"), "choose a multiple of 256"),
        (("--precision", "a7"), 'must be "a8" or "a15"'),
        (("--threads", "9999"), "threads is 9999"),
    ),
)
def test_errors_name_the_remedy(options: tuple[str, ...], message: str) -> None:
    few = ("--only", "matmul,attention", "--quick", "--prompts", "16")
    assert message in fail("kernels", *few, *TINY, *options, module=BENCH)
