"""What every test folder shares: the `native` marker and Hypothesis profiles."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def _has_native_core() -> bool:
    return importlib.util.find_spec("sagellm._core") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `native` tests in a pure-Python install, unless the run promised a native one."""
    if _has_native_core():
        return
    if os.environ.get("SAGELLM_REQUIRE_NATIVE"):
        raise pytest.UsageError(
            "SAGELLM_REQUIRE_NATIVE is set, but sagellm._core is missing: run ./build.sh build"
        )
    skip = pytest.mark.skip(reason="sagellm._core is not installed (pure-Python mode)")
    for item in items:
        if item.get_closest_marker("native"):
            item.add_marker(skip)
