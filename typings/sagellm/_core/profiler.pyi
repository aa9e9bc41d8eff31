"""
CPU profiles with gperftools.
"""
from __future__ import annotations
import os
import typing
__all__: list[str] = ['available', 'start', 'stop']
def start(path: os.PathLike | str | bytes) -> None:
    """
    Starts writing a CPU profile of the whole process to `path`.
    """
def stop() -> None:
    """
    Ends the profile and flushes it.
    """
available: bool = False
