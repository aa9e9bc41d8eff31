"""Measures the CUDA backend on this machine's device and sets it beside torch, Triton and
transformers.

``python -m gpu.benchmark --json FILE [--only PART ...] [--limit SECONDS]`` with ``tests`` on the
module path. Needs ``sagellm._cuda``. Every part runs in a process of its own, so that one that
fails, lacks its peer, or takes the device away leaves the others alone; what is there survives a
limit.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cuda import attention_benchmark
from gpu.measure import Report, llama_8b, random_checkpoint, seconds
from sagellm import _cuda as cuda
from sagellm.backends.cuda import CudaRunner, cublas_folders
from sagellm.backends.interface import ForwardBatch, SamplingRow
from sagellm.errors import DeviceUnavailableError

CONTEXT = 1024


PARTS = (
    "chip",
    "attention",
    "model",
    "elementwise",
    "attention_peers",
    "linear",
    "deterministic",
    "model_peers",
)
PART_SECONDS = 75.0  # one that hangs must not take the time of all


@functools.cache
def peers() -> Any:
    """torch, Triton and transformers: they take seconds to load, and may be missing."""
    return importlib.import_module("gpu.peers")


class Benchmarks:
    """The parts. `copy` and `matrix`: rates of the chip, in bytes and operations per second."""

    def __init__(self, report: Report, copy: float, matrix: float) -> None:
        self.report = report
        self.copy = copy
        self.matrix = matrix

    def chip(self) -> None:
        self.copy, self.matrix = peers().copy_rate(), peers().matrix_rate()
        self.report.add(
            area="chip", case="copy", what="read + write", value=self.copy / 1e12, unit="TB/s"
        )
        self.report.add(
            area="chip", case="8192^3 bf16", what="torch", value=self.matrix / 1e12, unit="TFLOP/s"
        )

    def attention(self) -> None:
        rng = np.random.default_rng(0)
        for load in attention_benchmark.LOADS:
            us = attention_benchmark.measure_us(load, 5, rng)
            floor = attention_benchmark.floor_us(load, self.copy / 1e12, self.matrix / 1e12)
            self._time("attention", load.name, "sagellm", us, floor)
            element = 2.0 if load.kv_type == "bfloat16" else 1.0 + 4.0 / load.head_dim
            if load.queries == 1 and not load.shared:
                kv = 2 * load.sequences * load.context * load.num_kv_heads * load.head_dim * element
                self.report.add(
                    area="attention", case=load.name, what="sagellm, KV read",
                    value=kv / us * 1e-3, unit="GB/s", bound=self.copy / 1e9,
                )  # fmt: skip
            elif load.queries == load.context:
                work = 2 * load.sequences * load.num_heads * load.head_dim * load.context**2
                self.report.add(
                    area="attention", case=load.name, what="sagellm, causal",
                    value=work / us * 1e-6, unit="TFLOP/s", bound=self.matrix / 1e12,
                )  # fmt: skip

    def attention_peers(self) -> None:
        for load in attention_benchmark.LOADS:
            if load.kv_type != "bfloat16" or load.deterministic or load.shared or load.window:
                continue
            if load.queries not in (1, load.context) or load.prefill_kernel != "auto":
                continue
            shape = (load.num_heads, load.num_kv_heads, load.head_dim)
            found = peers().sdpa_seconds(load.sequences, load.queries, load.context, *shape)
            for name, took in found.items():
                self._time("attention", load.name, f"torch SDPA, {name}", took * 1e6)
            if load.queries == 1:
                took = peers().triton_paged_seconds(
                    load.sequences, load.context, *shape, load.page_size
                )
                self._time("attention", load.name, "Triton, paged", took * 1e6)

    def linear(self) -> None:
        products = {"own gemm": cuda.gemm}
        try:
            products["cuBLASLt"] = cuda.CublasLt(cublas_folders()).gemm
        except DeviceUnavailableError as error:
            self.report.fail(f"linear: {error}")
        rng = np.random.default_rng(0)
        sizes = ((6144, 4096), (4096, 14336), (28672, 4096))
        shapes = [(m, n, k) for m in (1, 8, 64, 512, 4096) for n, k in sizes]

        def add(shape: tuple[int, int, int], name: str, took: float) -> None:
            m, n, k = shape
            floor = max(2 * n * k / self.copy, 2 * m * n * k / self.matrix)
            self._time("linear", f"m {m}, n {n}, k {k}", name, took * 1e6, floor * 1e6)

        for m, n, k in shapes:
            x, w = (
                cuda.array(rng.integers(0x3C00, 0x3E00, s).astype(np.uint16))
                for s in ((m, k), (n, k))
            )
            out = cuda.empty([m, n], np.dtype(np.uint16))
            for name, product in products.items():
                add(
                    (m, n, k),
                    name,
                    seconds(functools.partial(product, x, w, out), cuda.synchronize),
                )
        for shape in shapes:
            add(shape, "torch", peers().linear_seconds(*shape))

    def elementwise(self) -> None:
        rows, n = 8192, 4096
        wait = cuda.synchronize
        residual = cuda.array(np.zeros((rows, n), np.float32))
        weight = cuda.array(np.ones(n, np.float32))
        delta = cuda.array(np.full((rows, n), 0x3C00, np.uint16))
        out = cuda.empty([rows, n], np.dtype(np.uint16))
        took = seconds(
            lambda: cuda.add_rms_norm(residual, delta=delta, weight=weight, out=out), wait
        )
        self._rate("residual + RMSNorm, 8192 x 4096", rows * n * (4 + 4 + 2 + 2), took)
        width = 14336
        x = cuda.array(np.full((rows, 2 * width), 0x3C00, np.uint16))
        y = cuda.empty([rows, width], np.dtype(np.uint16))
        took = seconds(lambda: cuda.gated_activation(x, y), wait)
        self._rate("SiLU * up, 8192 x 14336", rows * width * 6, took)

    def model(self) -> None:
        runner = CudaRunner(random_checkpoint(llama_8b()), max_batch_tokens=4096)
        bound = runner.weight_bytes_per_token / self.copy
        decode = Decode(runner, 64)
        print(f"   {runner.matmul}, {runner.memory}", flush=True)
        for batch in (1, 8, 64):
            step, host = decode.measure(batch)
            kv = batch * CONTEXT * runner.kv_bytes_per_block(16) / 16 / self.copy
            case = f"Llama 8B bf16, batch {batch}, 1K"
            self._time("model", case, "sagellm, step", step * 1e6, (bound + kv) * 1e6)
            self._time("model", case, "sagellm, host", host * 1e6)
            queued = decode.measure_queue(batch)
            self._time("model", case, "sagellm, step of a queue", queued * 1e6, (bound + kv) * 1e6)
            self.report.add(
                area="model", case=case, what="sagellm", value=batch / step, unit="tok/s",
                bound=batch / (bound + kv),
            )  # fmt: skip
        decode.prefill(self.report, self.matrix)
        runner.close()

    def model_peers(self) -> None:
        for batch in (1, 64):
            took = peers().transformers_decode_seconds(batch, CONTEXT)
            case = f"Llama 8B bf16, batch {batch}, 1K"
            self._time("model", case, "transformers, step", took * 1e6)
            self.report.add(
                area="model", case=case, what="transformers", value=batch / took, unit="tok/s"
            )

    def deterministic(self) -> None:
        runner = CudaRunner(
            random_checkpoint(llama_8b(num_layers=8)), max_batch_tokens=4096, deterministic=True
        )
        free = CudaRunner(random_checkpoint(llama_8b(num_layers=8)), max_batch_tokens=4096)
        for name, one in (("deterministic", runner), ("free", free)):
            decode = Decode(one, 64)
            for batch in (1, 64):
                step, _ = decode.measure(batch)
                self._time("mode", f"8 layers, batch {batch}, 1K", name, step * 1e6)
            one.close()

    def _time(self, area: str, case: str, what: str, us: float, floor: float = 0.0) -> None:
        self.report.add(
            area=area, case=case, what=what, value=us, unit="us", better="lower", bound=floor
        )

    def _rate(self, case: str, moved: int, took: float) -> None:
        self.report.add(
            area="elementwise", case=case, what="sagellm", value=moved / took / 1e9, unit="GB/s",
            bound=self.copy / 1e9,
        )  # fmt: skip


class Decode:
    """Sequences of 1K tokens in a runner's pages; their content is that of fresh memory, which the
    time of a step does not depend on."""

    def __init__(self, runner: CudaRunner, sequences: int) -> None:
        self.runner = runner
        self.blocks = CONTEXT // 16 + 4
        runner.allocate_kv(sequences * self.blocks + 600, 16)
        order = np.random.default_rng(0).permutation(sequences * self.blocks).astype(np.int32) + 1
        self.tables = order.reshape(1, sequences, self.blocks)

    def batch(self, count: int, position: int) -> ForwardBatch:
        return ForwardBatch(
            token_ids=np.arange(count, dtype=np.int32),
            positions=np.full(count, position, np.int32),
            query_starts=np.arange(count + 1, dtype=np.int32),
            block_tables=np.ascontiguousarray(self.tables[:, :count]),
            block_copies=np.zeros((0, 2), np.int32),
            logit_rows=np.arange(count, dtype=np.int32),
        )

    def measure(self, count: int, steps: int = 24) -> tuple[float, float]:
        """Median seconds of a step, and of its host part before the device works alone."""
        rows = tuple(SamplingRow() for _ in range(count))
        times, hosts = [], []
        for i in range(steps):
            batch = self.batch(count, CONTEXT + i)
            start = time.perf_counter()
            self.runner.step(batch, rows)
            times.append(time.perf_counter() - start)
            hosts.append(self.runner.launch_seconds)
        return float(np.median(times[4:])), float(np.median(hosts[4:]))

    def measure_queue(self, count: int, steps: int = 48) -> float:
        """Median seconds from step to step with two queued, each fed by the tokens of the last."""
        rows = tuple(SamplingRow() for _ in range(count))
        sources = np.arange(count, dtype=np.int32)
        self.runner.launch(self.batch(count, CONTEXT), rows)
        ends = []
        for i in range(1, steps):
            batch = replace(self.batch(count, CONTEXT + i), token_sources=sources)
            self.runner.launch(batch, rows)
            self.runner.finish()
            ends.append(time.perf_counter())
        self.runner.finish()
        return float(np.median(np.diff(ends[8:])))

    def prefill(self, report: Report, matrix: float) -> None:
        count = 4096
        batch = ForwardBatch(
            token_ids=np.zeros(count, np.int32),
            positions=np.arange(count, dtype=np.int32),
            query_starts=np.array([0, count], np.int32),
            block_tables=np.arange(1, count // 16 + 1, dtype=np.int32).reshape(1, 1, -1),
            block_copies=np.zeros((0, 2), np.int32),
            logit_rows=np.array([count - 1], np.int32),
        )
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.runner.step(batch, (SamplingRow(),))
            times.append(time.perf_counter() - start)
        config = self.runner.config
        weights = self.runner.weight_bytes_per_token - 2 * config.vocab_size * config.hidden_size
        work = (
            count * weights + 2 * config.num_layers * config.num_heads * config.head_dim * count**2
        )
        step = float(np.median(times[1:]))
        report.add(
            area="model", case="Llama 8B bf16, prefill 4096", what="sagellm", value=count / step,
            unit="tok/s", bound=count * matrix / work,
        )  # fmt: skip


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = dict(cuda.device_info(0))
    return {
        "device": {key: str(value) for key, value in info.items()},
        "driver": cuda.driver_version(),
        "runtime": cuda.runtime_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "python": platform.python_version(),
    }


def run_part(name: str, path: Path, copy: float, matrix: float) -> None:
    """One part, in this process."""
    cuda.use_device(0)
    report = Report(path, machine())
    report.attempt(name, getattr(Benchmarks(report, copy, matrix), name))
    report.write()


def run_parts(names: list[str], path: Path, limit: float) -> int:
    """Each part in a process of its own; `path` is written after each.

    Returns:
        The number of failures.
    """
    end = time.monotonic() + limit
    content: dict[str, Any] = {"machine": {}, "results": [], "failures": []}
    rates = {"copy": 4.3e12, "matrix": 780e12}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            own = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "gpu.benchmark", "--json", str(own), "--part", name]
            command += [f"--{key}={value}" for key, value in rates.items()]
            failure = _run_within(command, min(PART_SECONDS, end - time.monotonic()))
            if failure:
                content["failures"].append(f"{name}: {failure}")
                print(f"FAILED {name}: {failure}", flush=True)
            if own.exists():
                part = json.loads(own.read_text())
                content["machine"] = part["machine"]
                content["results"] += part["results"]
                content["failures"] += part["failures"]
                for result in part["results"]:
                    if result["area"] == "chip":
                        key = "copy" if result["case"] == "copy" else "matrix"
                        rates[key] = result["value"] * 1e12
            path.write_text(json.dumps(content, indent=1))
    return len(content["failures"])


def _run_within(command: list[str], seconds_left: float) -> str:
    """Runs a part; returns what was wrong with it, or nothing."""
    if seconds_left < 5:
        return "no time was left"
    try:
        status = subprocess.run(command, timeout=seconds_left).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds_left:.0f} s"
    return f"exit status {status}" if status else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=PARTS)
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--copy", type=float, default=4.3e12, help=argparse.SUPPRESS)
    parser.add_argument("--matrix", type=float, default=780e12, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.json, options.copy, options.matrix)
        return 0
    return 1 if run_parts(options.only or list(PARTS), options.json, options.limit) else 0


if __name__ == "__main__":
    sys.exit(main())
