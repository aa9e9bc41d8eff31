"""
Threads, memory and what the machine gives.
"""
from __future__ import annotations
import typing
__all__: list[str] = ['device_kinds', 'peak_resident_bytes', 'read_bandwidth', 'register_op_table', 'resident_bytes']
def device_kinds() -> list[str]:
    """
    Device kinds that have operations in this process.
    """
def peak_resident_bytes() -> int:
    """
    Peak resident memory of this process in bytes (VmHWM).
    """
def read_bandwidth(threads: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex, repeat: typing.SupportsInt | typing.SupportsIndex = 5) -> float:
    """
    Median bytes per second of reading `bytes` of huge-page memory with `threads` threads.
    """
def register_op_table(capsule: typing.Any) -> None:
    """
    Gives a device kind the operations that another module brings, for the life of the process.
    """
def resident_bytes() -> int:
    """
    Resident memory of this process in bytes (VmRSS).
    """
