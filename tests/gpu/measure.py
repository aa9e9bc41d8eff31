"""What the GPU benchmarks share: timing, results, and a model with random weights."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.checkpoint.names import TensorSource, expected_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One figure.

    Attributes:
        bound: What the chip allows, in the same unit; 0 where there is no such bound.
        better: ``higher`` or ``lower``.
    """

    area: str
    case: str
    what: str
    value: float
    unit: str
    better: str = "higher"
    bound: float = 0.0


@dataclass(slots=True)
class Report:
    """Results in the order in which they came, and what did not run; `path` has them all the time.

    Attributes:
        machine: What they were taken on.
    """

    path: Path
    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, **fields: Any) -> None:
        result = Result(**fields)
        self.results.append(result)
        share = ""
        if result.bound:
            fraction = result.value / result.bound
            share = f"{1 / fraction if result.better == 'lower' else fraction:8.0%}"
        print(
            f"{result.area:12}{result.case:34}{result.what:24}{result.value:12.4g} "
            f"{result.unit:8}{share}",
            flush=True,
        )
        self.write()

    def fail(self, reason: str) -> None:
        self.failures.append(reason)
        print(f"FAILED {reason}", flush=True)
        self.write()

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Runs one part; what it raises is reported and the others go on."""
        start = time.perf_counter()
        try:
            work()
        except Exception as error:  # a part that fails must not hide the others
            self.fail(f"{name}: {type(error).__name__}: {error}")
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)

    def write(self) -> None:
        content = {
            "machine": self.machine,
            "results": [asdict(result) for result in self.results],
            "failures": self.failures,
        }
        self.path.write_text(json.dumps(content, indent=1))


def seconds(run: Callable[[], object], wait: Callable[[], object], repeat: int = 20) -> float:
    """Median over 5 rounds of the time of one call, `repeat` calls queued together."""
    run()
    wait()
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        wait()
        rounds.append((time.perf_counter() - start) / repeat)
    return statistics.median(rounds)


class _Random:
    """A file whose tensors are all views of the same random bfloat16 numbers of small size."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {
            name: SimpleNamespace(format="BF16", shape=shape) for name, shape in shapes.items()
        }
        largest = max(int(np.prod(shape)) for shape in shapes.values())
        bits = np.random.default_rng(0).integers(0, 1 << 16, largest, dtype=np.uint16)
        # Sign at random, exponent 119 to 122: magnitudes of 0.004 to 0.06.
        self._bits = (bits & 0x81FF) | 0x3B80
        self._ones = np.full(1 << 16, 0x3F80, np.uint16)

    def raw(self, name: str) -> NDArray[np.uint8]:
        shape = self.tensors[name].shape
        source = self._ones if len(shape) == 1 else self._bits
        return source[: int(np.prod(shape))].view(np.uint8)


def random_checkpoint(config: ModelConfig) -> Any:
    """What CudaRunner reads of a checkpoint, with random weights."""
    shapes = expected_shapes(config)
    return SimpleNamespace(
        config=config,
        files=[_Random(shapes)],
        sources={name: TensorSource(file=0, tensor=name) for name in shapes},
    )


def llama_8b(**changes: Any) -> ModelConfig:
    """The shape of Llama 3 8B."""
    fields: dict[str, Any] = {
        "architecture": "llama",
        "name": "random",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_position": 8192,
        "norm_eps": 1e-5,
        "rope": RopeConfig(theta=500000.0, dim=128),
        "layer_windows": (0,) * 32,
        "attention_scale": 128**-0.5,
    }
    fields |= changes
    if "num_layers" in changes:
        fields["layer_windows"] = (0,) * changes["num_layers"]
    return ModelConfig(**fields)
