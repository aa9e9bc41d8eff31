"""``sagellm_protocol`` is ``sagellm.protocol`` by another name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import sagellm.protocol
import sagellm_protocol


def test_example_of_the_requirement_runs_as_written() -> None:
    from sagellm_protocol import ErrorCode, Metrics, Request, Response

    req = Request(
        request_id="req-001",
        trace_id="trace-001",
        model="llama2-7b",
        prompt="Hello, world!",
        max_tokens=128,
        stream=False,
        temperature=0.7,
    )
    metrics = Metrics(
        ttft_ms=45.2,
        tbt_ms=12.5,
        throughput_tps=80.0,
        peak_mem_mb=24576,
        error_rate=0.0,
    )
    resp = Response(
        request_id="req-001",
        trace_id="trace-001",
        output_text="Hi there!",
        output_tokens=[42, 17],
        finish_reason="stop",
        metrics=metrics,
    )
    assert (req.temperature, resp.metrics.tpot_ms, resp.error) == (0.7, None, None)
    assert ErrorCode("unavailable") is ErrorCode.UNAVAILABLE


def test_alias_exports_the_same_objects() -> None:
    assert set(sagellm_protocol.__all__) == set(sagellm.protocol.__all__)
    for name in sagellm.protocol.__all__:
        assert getattr(sagellm_protocol, name) is getattr(sagellm.protocol, name)


def test_alias_has_the_same_submodules() -> None:
    types = importlib.import_module("sagellm_protocol.types")
    kv_hooks = importlib.import_module("sagellm_protocol.kv_hooks")
    assert types.Request is sagellm.protocol.Request
    assert kv_hooks.KVHandle is sagellm.protocol.KVHandle


def test_protocol_loads_nothing_else_of_sagellm() -> None:
    code = (
        "import sys, sagellm.protocol\n"
        "print(*sorted(m for m in sys.modules if m.startswith(('sagellm', 'numpy', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    others = [m for m in done.stdout.split() if not m.startswith("sagellm.protocol")]
    assert others == ["sagellm", "sagellm.lazy_names"]
