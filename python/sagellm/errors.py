"""The error tree of sagellm.

Every error that reaches a user is one of these and names its remedy.
"""

from __future__ import annotations


class SagellmError(Exception):
    """Root of every error raised on purpose."""


class InvalidArgumentError(SagellmError, ValueError):
    """A value that the caller may correct."""


class UnsupportedError(SagellmError):
    """A valid request that this build, machine or model cannot serve."""


class CorruptFileError(SagellmError):
    """A model file that is truncated, inconsistent or hostile."""


class ModelNotFoundError(SagellmError):
    """A model name that resolves to nothing, or a download that failed."""


class ResourceExhaustedError(SagellmError):
    """Memory, KV blocks or queue places ran out; the message names the knob to turn."""


class QueueFullError(ResourceExhaustedError):
    """The queue takes no more now; the same request may succeed a moment later."""


class DeviceUnavailableError(SagellmError):
    """A device that was asked for cannot run here."""


class UnavailableError(SagellmError):
    """The engine has stopped, or stopped working."""
