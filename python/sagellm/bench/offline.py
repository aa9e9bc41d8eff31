"""A real model driven through the engine: prefill, decode, first token, memory, bandwidth.

Every repeat runs a prefill pass (all prompts, one token each), a full pass and a bandwidth probe,
so that the probe is of the same minute as the figures. Prompts are random token ids, different in
every repeat and stream: no prefix is ever shared.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sagellm.bench import report
from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.config import EngineConfig, Speculation
from sagellm.engine.engine import Engine
from sagellm.engine.llm import new_request
from sagellm.engine.loading import load_engine
from sagellm.engine.memory import peak_memory_mb
from sagellm.errors import InvalidArgumentError, ResourceExhaustedError, SagellmError
from sagellm.native import load_core
from sagellm.terminal import pull_progress

_MIN_PROBE_BYTES = 64 << 20
_HASH_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineResult:
    """Medians over the repeats, and what they were measured on.

    Attributes:
        prefill_tps: Prompt tokens per second, all streams.
        decode_tps: Output tokens per second over all streams, once every stream decodes.
        decode_spread: (max - min) / median of ``decode_runs``.
        ttft_ms: Submission to the first token of the last stream.
        startup_s: Start of the process to a loaded engine, without the download of the model.
        peak_mem_mb: Largest resident set before the first probe, in MB; includes mapped weights.
        kv_mb: The KV pool, in MiB.
        bytes_per_token: Weight bytes of one step divided by the streams, plus the KV bytes of one
            stream at its mean context. None where the backend does not know.
        decode_gbps: bytes_per_token * decode_tps, in 10^9.
        probe_gbps: Read bandwidth over as many bytes as the weights, in the same minute; None
            without the native core.
        probe_percent: decode_gbps as a share of probe_gbps.
        spec_accept_rate: Share of the drafted tokens that were accepted; None if there were none.
            ``decode_gbps`` counts the bytes of steps of one token and means little then.
        logits_hash: SHA-256 (16 hex digits) of the float32 logits of a fixed prompt: equal hashes,
            equal bytes.
        decode_runs, probe_runs: What the medians are of.
    """

    model: str
    device: str
    isa: str
    precision: str
    kv_dtype: str
    threads: int
    streams: int
    prompt_tokens: int
    output_tokens: int
    repeat: int
    prefill_tps: float
    decode_tps: float
    decode_spread: float
    ttft_ms: float
    startup_s: float
    peak_mem_mb: int
    kv_mb: float
    bytes_per_token: float | None
    decode_gbps: float | None
    probe_gbps: float | None
    probe_percent: float | None
    logits_hash: str
    spec_accept_rate: float | None
    decode_runs: tuple[float, ...]
    probe_runs: tuple[float, ...]


def run(
    model: str,
    *,
    prompt_tokens: int,
    output_tokens: int,
    streams: int,
    threads: int | None,
    repeat: int,
    precision: str | None,
    kv_dtype: str | None,
    device: str,
    deterministic: bool = False,
    speculation: Speculation = "off",
) -> OfflineResult:
    """Loads the model, downloading it first if need be, and measures it.

    Raises:
        InvalidArgumentError: The sizes exceed the model's context.
        ResourceExhaustedError: So many streams of that length do not fit in memory.
    """
    waited = time.perf_counter()
    if device != "mock":  # it has no files
        with pull_progress(model) as progress:
            model = str(resolve_model(model, auto_pull=True, progress=progress))
    waited = time.perf_counter() - waited
    length = prompt_tokens + output_tokens
    config = EngineConfig(
        max_num_seqs=streams,
        max_batch_tokens=max(512, streams),
        kv_cache_tokens=streams * (length + 64),
        speculation=speculation,
    )
    try:
        engine = load_engine(
            model,
            config,
            device=device,
            threads=threads,
            precision=precision,
            deterministic=deterministic or None,
            kv_dtype=kv_dtype,
        )
    except ResourceExhaustedError as error:
        raise ResourceExhaustedError(
            f"{error}; that is for {streams} streams of {length} tokens, so lower --streams, "
            "--prompt-tokens or --output-tokens"
        ) from None
    startup = _seconds_since_process_start() - waited
    try:
        if length > engine.capacity.max_model_len:
            raise InvalidArgumentError(
                f"{prompt_tokens} + {output_tokens} tokens exceed the model's context of "
                f"{engine.capacity.max_model_len}; lower --prompt-tokens or --output-tokens"
            )
        bench = _Bench(engine, prompt_tokens, output_tokens, streams)
        logits_hash = hash_logits(engine)
        bench.warm_up()
        with report.progress() as bar:
            task = bar.add_task("offline", total=repeat)
            for _ in range(repeat):
                bench.measure()
                bar.advance(task)
        return bench.result(Path(model).name, startup, repeat, logits_hash)
    finally:
        engine.close()


class _Bench:
    def __init__(
        self, engine: Engine, prompt_tokens: int, output_tokens: int, streams: int
    ) -> None:
        self.engine = engine
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.streams = streams
        self.threads = int(getattr(engine.runner, "threads", 1))
        self.weight_bytes = getattr(engine.runner, "weight_bytes_per_token", None)
        self.rng = np.random.default_rng(0)
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.ttft: list[float] = []
        self.probes: list[float] = []
        self.peak_mem_mb = 0

    def warm_up(self) -> None:
        """One pass with a short output: pages are touched, code is in the caches."""
        self._pass(self.prompt_tokens, min(self.output_tokens, 8))

    def measure(self) -> None:
        """One repeat."""
        start, first, _ = self._pass(self.prompt_tokens, 1)
        self.prefill.append(self.streams * self.prompt_tokens / (first - start))
        self.ttft.append((first - start) * 1e3)
        _, _, rate = self._pass(self.prompt_tokens, self.output_tokens)
        self.decode.append(rate)
        self.peak_mem_mb = self.peak_mem_mb or peak_memory_mb()  # the probe takes some, too
        if self.weight_bytes is not None:
            size = max(int(self.weight_bytes), _MIN_PROBE_BYTES)
            self.probes.append(load_core().runtime.read_bandwidth(self.threads, size, 5) / 1e9)

    def _pass(self, prompt_tokens: int, output_tokens: int) -> tuple[float, float, float]:
        """Runs every stream once.

        Returns its start, when the last stream had its first token, and the tokens per second from
        then to the end (0 when nothing was left).
        """
        engine = self.engine
        vocab = engine.runner.config.vocab_size
        start = time.perf_counter()
        states = []
        for _ in range(self.streams):
            request = new_request(max_tokens=output_tokens, ignore_eos=True)
            prompt: NDArray[np.int32] = self.rng.integers(0, vocab, prompt_tokens, dtype=np.int32)
            state = engine.prepare(request, prompt)
            engine.add(state)
            states.append(state)
        sequences = [state.sequences[0] for state in states]
        while any(sequence.first_token_at is None for sequence in sequences):
            self._step()
        first = time.perf_counter()
        before = sum(len(sequence.output_tokens) for sequence in sequences)
        while engine.has_work:
            self._step()
        end = time.perf_counter()
        count = sum(len(sequence.output_tokens) for sequence in sequences) - before
        return start, first, count / (end - first) if count else 0.0

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finished is not None and output.finished.failure is not None:
                raise SagellmError(output.finished.failure.message)

    def result(self, model: str, startup: float, repeat: int, logits_hash: str) -> OfflineResult:
        """Medians of what was measured."""
        runner = self.engine.runner
        decode = report.median(self.decode)
        probe = report.median(self.probes) if self.probes else None
        per_token = rate = None
        if self.weight_bytes is not None:
            per_token = self.weight_bytes / self.streams + self._kv_bytes_read()
            rate = per_token * decode / 1e9
        return OfflineResult(
            model=model,
            device=runner.device,
            isa=str(getattr(runner, "isa", "")),
            precision=str(getattr(runner, "precision", "float32")),
            kv_dtype=runner.kv_dtype,
            threads=self.threads,
            streams=self.streams,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            repeat=repeat,
            prefill_tps=report.median(self.prefill),
            decode_tps=decode,
            decode_spread=report.spread(self.decode),
            ttft_ms=report.median(self.ttft),
            startup_s=startup,
            peak_mem_mb=self.peak_mem_mb,
            kv_mb=runner.memory["kv"] / 2**20,
            bytes_per_token=per_token,
            decode_gbps=rate,
            probe_gbps=probe,
            probe_percent=100 * rate / probe if rate is not None and probe else None,
            logits_hash=logits_hash,
            spec_accept_rate=self.engine.stats().spec_accept_rate,
            decode_runs=tuple(self.decode),
            probe_runs=tuple(self.probes),
        )

    def _kv_bytes_read(self) -> float:
        """KV bytes that one decode step of one stream reads, at the mean context of the run."""
        runner, size = self.engine.runner, self.engine.config.block_size
        config = runner.config
        context = self.prompt_tokens + self.output_tokens / 2
        slots = max(len(group.layers) for group in runner.kv_groups)
        per_token = runner.kv_bytes_per_block(size) / (size * slots)  # of one layer
        return float(
            sum(
                per_token * (min(context, window) if window else context)
                for window in config.layer_windows
            )
        )


def hash_logits(engine: Engine) -> str:
    """Fingerprint of the logits of a fixed prompt of 64 tokens."""
    vocab = engine.runner.config.vocab_size
    count = min(_HASH_TOKENS, engine.capacity.max_model_len)
    ids = np.random.default_rng(0).integers(0, vocab, count, dtype=np.int32)
    return hashlib.sha256(engine.logits(ids).tobytes()).hexdigest()[:16]


def show(result: OfflineResult, *, as_json: bool) -> None:
    """Prints the result."""
    if as_json:
        report.print_json(asdict(result))
        return
    rows = [
        (name, value)
        for name, value in asdict(result).items()
        if value is not None and not name.endswith("_runs")
    ]
    report.print_table("offline", ("figure", "value"), rows)


def plot(result: OfflineResult, path: Path) -> None:
    """Draws the decode speed of every repeat beside what the bandwidth probe allows."""
    with report.figure(path) as axes:
        runs = range(1, result.repeat + 1)
        axes.bar(runs, result.decode_runs, width=0.6, label="decode")
        if result.bytes_per_token:
            roof = [1e9 * gbps / result.bytes_per_token for gbps in result.probe_runs]
            axes.plot(runs, roof, "k_--", label="read bandwidth / bytes per token")
        axes.set_xticks(list(runs))
        axes.set_xlabel("repeat")
        axes.set_ylabel("tokens/s")
        axes.set_title(
            f"{result.model}: {result.streams} streams, {result.threads} threads, {result.isa}"
        )
        axes.legend(loc="lower right")


def _seconds_since_process_start() -> float:
    """From the kernel's start time of this process, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
