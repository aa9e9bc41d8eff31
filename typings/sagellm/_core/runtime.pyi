"""
Threads, memory and what the machine gives.
"""
from __future__ import annotations
import typing
__all__: list[str] = ['peak_resident_bytes', 'read_bandwidth', 'resident_bytes']
def peak_resident_bytes() -> int:
    """
    Peak resident memory of this process in bytes (VmHWM).
    """
def read_bandwidth(threads: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex, repeat: typing.SupportsInt | typing.SupportsIndex = 5) -> float:
    """
    Median bytes per second of reading `bytes` of huge-page memory with `threads` threads.
    """
def resident_bytes() -> int:
    """
    Resident memory of this process in bytes (VmRSS).
    """
