"""What `_core` takes from another module: its operations, when both were built together."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from sagellm.errors import InvalidArgumentError
from sagellm.native import load_core

pytestmark = pytest.mark.native


def capsule(name: bytes, content: ctypes.Array[Any]) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(content), name, None)


def test_a_table_of_another_build_is_refused() -> None:
    runtime = load_core().runtime
    before = runtime.device_kinds()
    content = (ctypes.c_uint64 * 3)(1, 1, 0)  # a layout that no build has
    name = b"sagellm.op_table"
    with pytest.raises(InvalidArgumentError, match="another version of sagellm; install modules"):
        runtime.register_op_table(capsule(name, content))
    assert runtime.device_kinds() == before and "cpu" in before


@pytest.mark.parametrize("name", [b"sagellm.other", b"op_table"])
def test_only_a_capsule_of_the_right_name_is_taken(name: bytes) -> None:
    runtime = load_core().runtime
    with pytest.raises(InvalidArgumentError, match=r"a capsule named sagellm\.op_table"):
        runtime.register_op_table(capsule(name, (ctypes.c_uint64 * 3)()))
    with pytest.raises(InvalidArgumentError, match=r"a capsule named sagellm\.op_table"):
        runtime.register_op_table(object())
