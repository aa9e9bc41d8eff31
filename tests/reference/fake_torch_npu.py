"""A stand-in for an Ascend device: ``npu`` means the CPU, and torch_npu's operator checks hard.

It checks the operator's arguments against the documented limits of paged attention with one query
token. It shows that the calls are well-formed, not that a device computes the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


class NpuIsCpu(torch.overrides.TorchFunctionMode):  # type: ignore[misc, name-defined, unused-ignore]
    """Every torch call that names an ``npu`` device runs on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **named)


def _on_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value.startswith("npu") else value


class FakeTorchNpu(ModuleType):
    """The module; ``calls`` are the lengths of every call, ``fault`` changes what it computes."""

    def __init__(self, devices: int = 1) -> None:
        super().__init__("torch_npu")
        self.__spec__ = ModuleSpec("torch_npu", None)
        self.npu = SimpleNamespace(device_count=lambda: devices)
        self.calls: list[list[int]] = []
        self.fault = ""

    def npu_fused_infer_attention_score(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        actual_seq_lengths_kv: list[int],
        block_table: Any,
        num_heads: int,
        num_key_value_heads: int,
        scale: float,
        input_layout: str,
        block_size: int,
        inner_precise: int,
    ) -> tuple[Any, Any]:
        lengths = actual_seq_lengths_kv
        _check_pages(query, key, value, num_heads, num_key_value_heads, input_layout, block_size)
        _check_table(block_table, lengths, len(query), len(key), block_size)
        assert isinstance(scale, float) and inner_precise == 0
        self.calls.append(lengths)
        if self.fault == "scale":
            scale = 1.0
        dim = query.shape[2] // num_heads
        rows = []
        for q, table, length in zip(query, block_table.long(), lengths, strict=True):
            seen = length - 1 if self.fault == "length" and length > 1 else length
            k, v = (
                pages[table].reshape(-1, num_key_value_heads, dim)[:seen].transpose(0, 1).float()
                for pages in (key, value)
            )
            rows.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q.reshape(num_heads, 1, dim).float(), k, v, scale=scale, enable_gqa=True
                ).reshape(1, num_heads * dim)
            )
        return torch.stack(rows).to(query.dtype), torch.zeros(1)


def _check_pages(
    query: Any, key: Any, value: Any, heads: int, kv_heads: int, layout: str, block_size: int
) -> None:
    assert layout == "BSH"
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.dtype == key.dtype == value.dtype
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    assert query.dim() == 3 and query.shape[1] == 1 and len(query) > 0
    assert key.dim() == 3 and key.shape == value.shape and key.shape[1] == block_size
    assert block_size % 16 == 0 and 0 < block_size <= 512
    assert heads % kv_heads == 0 and heads // kv_heads <= 64 and heads <= 256
    assert query.shape[2] % heads == 0
    assert query.shape[2] // heads == key.shape[2] // kv_heads <= 512
    assert key.shape[2] % kv_heads == 0 and key.shape[2] <= 65536
    assert key.numel() < 2**31


def _check_table(table: Any, lengths: list[int], count: int, pages: int, block_size: int) -> None:
    assert table.dtype == torch.int32 and table.is_contiguous() and table.dim() == 2
    assert isinstance(lengths, list) and all(type(length) is int for length in lengths)
    assert len(lengths) == len(table) == count
    blocks = [-(-length // block_size) for length in lengths]
    assert min(lengths) > 0 and max(blocks) <= table.shape[1]
    assert sum(blocks) <= pages
    for row, used in zip(table, blocks, strict=True):
        assert row.min() >= 0 and row.max() < pages
        assert row[:used].min() > 0  # block 0 is padding, never a token's


@contextmanager
def ascend(monkeypatch: pytest.MonkeyPatch, fake: ModuleType) -> Iterator[None]:
    """A machine with an Ascend device and ``fake`` as torch_npu."""
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    with NpuIsCpu():
        yield
