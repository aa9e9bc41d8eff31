"""Runs in a clean virtual environment after an install: imports, then real tokens.

`SAGELLM_EXPECT` says which install this is: `native` or `pure`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    import sagellm
    import sagellm_protocol

    expected = os.environ["SAGELLM_EXPECT"]
    installed = Path(sagellm.__file__).resolve()
    assert installed.is_relative_to(Path(sys.prefix).resolve()), f"imported from {installed}"
    native = importlib.util.find_spec("sagellm._core") is not None
    assert native == (expected == "native"), f"expected a {expected} install"
    if native:
        from sagellm import _core

        assert _core.__version__ == importlib.metadata.version("sagellm")
    assert sagellm_protocol.Request is sagellm.protocol.Request
    scripts = importlib.resources.files("sagellm") / "cmake"
    assert (scripts / "shared_deps.cmake").is_file(), "the CMake scripts are not in the wheel"

    command = [Path(sys.executable).with_name("sagellm"), "run", "smollm2"]
    options = ["--max-tokens", "4", "--greedy", "--raw", "--json", "-p", "The capital of France is"]
    printed = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(printed.stdout)
    assert len(answer["output_tokens"]) == 4, answer
    assert "Paris" in answer["output_text"], answer
    print(f"{expected} install: {answer['output_text']!r}")


if __name__ == "__main__":
    main()
