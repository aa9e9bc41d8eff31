"""Programs that stand for ``llama-bench`` and ``llama-batched-bench``."""

from __future__ import annotations

import sys
from pathlib import Path

_BENCH = """#!{python}
import json, os, subprocess, sys, time
words = sys.argv[1:]
if words == ["--version"]:
    sys.exit("version: 9 (build 8, commit abc)")
hang = {hang!r}
def option(name):
    return int(words[words.index(name) + 1])
if hang:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(hang, "w") as pids:
        pids.write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(1000)
assert words[words.index("-o") + 1] == "jsonl" and option("-t") >= 1 and option("-r") == 1
prompt, output = option("-p"), option("-n")
depth = option("-d") if "-d" in words else 0
speed = 400.0 + prompt if prompt else 50.0 + output / 4 + depth / 16
print(json.dumps({{"build_commit": "abc", "build_number": 8, "avg_ts": speed}}))
"""
_BATCHED = """#!{python}
import json, sys
words = sys.argv[1:]
def option(name):
    return int(words[words.index(name) + 1])
streams, prompt, output = option("-npl"), option("-npp"), option("-ntg")
assert option("-c") == streams * (prompt + output)
print("loading")
print(json.dumps({{"pl": streams, "speed_pp": 1.0, "speed_tg": 75.0 + streams}}))
"""


def install_fake_llama(folder: Path, hang: Path | None = None) -> None:
    """Puts both into ``folder``; with ``hang`` the first writes its processes there and hangs."""
    programs = folder / "llama.cpp" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("llama-bench", _BENCH), ("llama-batched-bench", _BATCHED)):
        program = programs / name
        program.write_text(text.format(python=sys.executable, hang=hang and str(hang)))
        program.chmod(0o755)
