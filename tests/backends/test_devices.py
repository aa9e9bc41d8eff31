"""Which devices are offered, why the others are not, and what a name resolves to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.make_tiny import make_tiny_gguf
from sagellm.backends import devices
from sagellm.backends.devices import create_runner, probe_devices, select_device
from sagellm.checkpoint import Checkpoint, open_checkpoint
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, at import


def fake_core(error: float = 0.0) -> Any:
    """A native core whose matmul is NumPy's, off by ``error``."""
    return SimpleNamespace(
        quant=SimpleNamespace(
            quantize=lambda kind, weights: weights, pack=lambda kind, raw, n, k: raw
        ),
        kernels=SimpleNamespace(
            selected_isa=lambda: "avx2",
            matmul=lambda isa, packed, x, precision: x @ packed.T + np.float32(error),
        ),
    )


def without_core() -> Any:
    raise DeviceUnavailableError("no compiled core; reinstall")


def without_cuda(index: int) -> Any:
    raise DeviceUnavailableError("this install was built without CUDA; reinstall with nvcc")


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels and no others."""
    monkeypatch.setattr(devices, "load_core", fake_core)
    monkeypatch.setattr(devices, "probe_cuda", without_cuda)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "torch_npu"):
        monkeypatch.setitem(sys.modules, package, None)


Ascend = Callable[[ModuleType], None]


@pytest.fixture
def ascend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ascend]:
    """Call it with a torch_npu to have a machine with Ascend devices."""
    pytest.importorskip("torch", reason="torch is not installed")
    from reference import fake_torch_npu

    entered: list[AbstractContextManager[None]] = []

    def enter(module: ModuleType) -> None:
        context = fake_torch_npu.ascend(monkeypatch, module)
        context.__enter__()
        entered.append(context)

    yield enter
    for context in entered:
        context.__exit__(None, None, None)


def fake_torch_npu(count: int = 1) -> ModuleType:
    from reference.fake_torch_npu import FakeTorchNpu

    return FakeTorchNpu(count)


def reason_of(name: str) -> str:
    (status,) = [status for status in probe_devices() if status.name == name]
    assert not status.available
    return status.reason


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf"))


@pytest.mark.usefixtures("core", "no_torch")
def test_the_probe_lists_every_device_best_first() -> None:
    statuses = probe_devices()
    assert [(status.name, status.available) for status in statuses] == [
        ("cuda", False),
        ("ascend", False),
        ("cpu", True),
        ("reference", True),
        ("torch", False),
    ]
    for status in statuses:
        assert status.reason and "\n" not in status.reason
        assert status.available or ";" in status.reason  # cause; remedy


@pytest.mark.usefixtures("core", "no_torch")
@pytest.mark.parametrize(
    ("device", "cause", "remedy"),
    [
        ("cuda", "built without CUDA", "reinstall"),
        ("cuda:1", "built without CUDA", "reinstall"),
        ("ascend", "torch is not installed", "CANN"),
        ("ascend:0", "torch is not installed", "CANN"),
        ("torch", "torch is not installed", r"pip install 'sagellm\[torch\]'"),
        ("torch:cpu", "torch is not installed", r"pip install 'sagellm\[torch\]'"),
    ],
)
def test_a_named_device_that_cannot_run_is_an_error_with_a_remedy(
    device: str, cause: str, remedy: str
) -> None:
    with pytest.raises(DeviceUnavailableError, match=f"'{device}' cannot run.*{cause}.*{remedy}"):
        select_device(device)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; choose one of auto, cuda, ascend, cpu"),
        ("", "unknown device"),
        ("auto:0", "not of the form auto"),
        ("cpu:0", "not of the form cpu"),
        ("reference:cpu", "not of the form reference"),
        ("mock:1", "not of the form mock"),
        ("torch:", "not of the form torch"),
        ("ascend:", "not of the form ascend:INDEX, such as ascend:0"),
        ("ascend:x", "not of the form ascend:INDEX"),
        ("ascend:-1", "not of the form ascend:INDEX"),
        ("cuda:0:1", "not of the form cuda:INDEX"),
    ],
)
def test_a_name_that_is_no_device_is_refused(device: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        select_device(device)


@pytest.mark.usefixtures("core", "no_torch")
def test_auto_takes_the_native_core_and_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sagellm"):
        assert select_device() == "cpu"
    (line,) = caplog.messages
    assert line.startswith("device cpu: native kernels, avx2; not cuda: ")
    assert "not ascend: torch is not installed" in line


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("load_core", "cause"),
    [
        (without_core, "no compiled core"),
        (lambda: fake_core(0.3), "self-test failed: matmul differs from NumPy by 0.3"),
        (lambda: fake_core(float("nan")), "self-test failed: matmul differs from NumPy by nan"),
    ],
)
def test_auto_passes_over_a_core_that_is_absent_or_wrong(
    load_core: Callable[[], Any],
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(devices, "load_core", load_core)
    with caplog.at_level(logging.INFO, "sagellm"):
        assert select_device("auto") == "reference"
    (line,) = caplog.messages
    assert line.startswith("device reference: NumPy, float32") and f"not cpu: {cause}" in line
    with pytest.raises(DeviceUnavailableError, match=cause):
        select_device("cpu")


@pytest.mark.usefixtures("core")
def test_auto_takes_an_ascend_device_that_passes_its_self_test(
    ascend: Ascend, caplog: pytest.LogCaptureFixture
) -> None:
    ascend(fake_torch_npu(2))
    with caplog.at_level(logging.INFO, "sagellm"):
        assert select_device() == "ascend"
    (line,) = caplog.messages
    assert line.startswith("device ascend: reference backend on torch npu:0, 2 devices; not cuda")
    assert select_device("ascend:1") == "ascend:1"


@pytest.mark.usefixtures("core")
def test_torch_without_torch_npu_has_no_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert reason_of("ascend").startswith("torch_npu is not installed; install CANN")
    assert select_device("torch") == "torch"


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("count", [0, 1])
def test_an_ascend_index_past_the_devices_is_an_error(count: int, ascend: Ascend) -> None:
    ascend(fake_torch_npu(count))
    with pytest.raises(DeviceUnavailableError, match=f"sees {count} devices.*no npu:{count}.*smi"):
        select_device(f"ascend:{count}")
    if not count:
        assert select_device() == "cpu"


def _broken(error: Exception) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("aclInit failed, 507008\nlong report"),
        OSError("libascendcl.so: no such file"),
        ImportError("undefined symbol"),
    ],
)
def test_a_torch_npu_that_does_not_load_is_named(error: Exception, ascend: Ascend) -> None:
    module = fake_torch_npu()
    module.npu = SimpleNamespace(device_count=_broken(error))
    ascend(module)
    reason = reason_of("ascend")
    assert str(error).partition("\n")[0] in reason and "\n" not in reason
    assert "set_env.sh" in reason
    assert select_device() == "cpu"


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("activation", "cause"),
    [
        (lambda ops, kind, x: x, "attention differs from NumPy by"),
        (lambda ops, kind, x: x * float("nan"), "attention differs from NumPy by nan"),
        (_broken(RuntimeError("operator not found\nlong report")), "operator not found;"),
    ],
)
def test_an_ascend_device_that_computes_wrongly_fails_its_self_test(
    activation: Any, cause: str, ascend: Ascend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascend(fake_torch_npu())
    right = devices.ArrayOps.activation

    def on_device(ops: Any, kind: Any, x: Any) -> Any:
        return (activation if ops.device == "npu:0" else right)(ops, kind, x)

    monkeypatch.setattr(devices.ArrayOps, "activation", on_device)
    assert f"self-test on npu:0 failed: {cause}" in reason_of("ascend")
    assert select_device() == "cpu"
    with pytest.raises(DeviceUnavailableError, match="self-test on npu:0 failed"):
        select_device("ascend")


@pytest.mark.parametrize(("device", "torch_device"), [("ascend", "npu:0"), ("ascend:1", "npu:1")])
def test_ascend_is_the_reference_backend_on_torch_npu(
    device: str, torch_device: str, ascend: Ascend, checkpoint: Checkpoint
) -> None:
    ascend(fake_torch_npu(2))
    runner = create_runner(checkpoint, device)
    assert runner.device == f"torch:{torch_device}"


def test_other_names_give_their_backend(checkpoint: Checkpoint) -> None:
    assert create_runner(checkpoint, "reference", max_batch_tokens=64).device == "reference"
    with pytest.raises(InvalidArgumentError, match="'reference' has no option precision"):
        create_runner(checkpoint, "reference", precision="a15")
    with pytest.raises(InvalidArgumentError, match="'reference' has no option threads"):
        create_runner(checkpoint, "reference", threads=2)
    with pytest.raises(InvalidArgumentError, match="no option kv_dtype; leave it out"):
        create_runner(checkpoint, "reference", kv_dtype="int8")
    with pytest.raises(InvalidArgumentError, match="no option deterministic; leave it out"):
        create_runner(checkpoint, "reference", deterministic=True)
    with pytest.raises(InvalidArgumentError, match="MockRunner"):
        create_runner(checkpoint, "mock")
    pytest.importorskip("torch", reason="torch is not installed")
    assert create_runner(checkpoint, "torch").device == "torch:cpu"
    assert create_runner(checkpoint, "torch:cpu").device == "torch:cpu"
    with pytest.raises(DeviceUnavailableError, match="cuda:7"):
        create_runner(checkpoint, "torch:cuda:7")


@pytest.mark.native
def test_the_kv_dtype_is_told_and_paid_for(checkpoint: Checkpoint) -> None:
    default, bf16, int8 = (
        create_runner(checkpoint, "cpu", threads=1, kv_dtype=dtype)
        for dtype in ("auto", "bf16", "int8")
    )
    assert [r.kv_dtype for r in (default, bf16, int8)] == ["bf16", "bf16", "int8"]
    heads, dim = checkpoint.config.num_kv_heads, checkpoint.config.head_dim
    slots = max(len(group.layers) for group in int8.kv_groups)
    assert bf16.kv_bytes_per_block(32) == slots * heads * 32 * 4 * dim
    assert int8.kv_bytes_per_block(32) == slots * heads * 32 * (2 * dim + 8)  # codes and scales
    int8.allocate_kv(6, 32)
    assert int8.memory["kv"] == 7 * int8.kv_bytes_per_block(32)  # block 0 is padding
    with pytest.raises(InvalidArgumentError, match="kv_dtype is 'fp8'; choose 'auto', 'bf16'"):
        create_runner(checkpoint, "cpu", kv_dtype="fp8")


@pytest.mark.native
def test_the_native_core_runs_here(checkpoint: Checkpoint) -> None:
    assert select_device("cpu") == "cpu"
    assert create_runner(checkpoint, "cpu", threads=1).device == "cpu"
