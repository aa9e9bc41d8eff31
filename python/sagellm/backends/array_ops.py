"""The few operations of a decoder, written once over an array-API namespace (NumPy, torch)."""

from __future__ import annotations

import importlib
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagellm.errors import DeviceUnavailableError, InvalidArgumentError

Array = Any
"""An array of the namespace in use: ``numpy.ndarray`` or ``torch.Tensor``."""

ArrayNamespace = Literal["numpy", "torch"]


class ArrayOps:
    """Operations on arrays of one namespace and one device. Activations are float32.

    Attributes:
        xp: The array-API namespace (``array_api_compat.numpy`` or ``.torch``).
        device: ``cpu`` for NumPy, else a torch device string such as ``npu:0``.
    """

    def __init__(self, namespace: ArrayNamespace = "numpy", device: str | None = None) -> None:
        """Imports the namespace and checks that the device runs.

        Raises:
            InvalidArgumentError: An unknown namespace, or a device with NumPy.
            DeviceUnavailableError: torch is absent or cannot use the device.
        """
        if namespace not in ("numpy", "torch"):
            raise InvalidArgumentError(
                f"unknown array namespace {namespace!r}; use 'numpy' or 'torch'"
            )
        if namespace == "numpy" and device not in (None, "cpu"):
            raise InvalidArgumentError(
                f"NumPy runs on 'cpu' only, not on {device!r}; use torch for devices"
            )
        self.device = device or "cpu"
        self._namespace = namespace
        if namespace == "torch":
            self._torch = _import_torch(self.device)
        self.xp: Any = importlib.import_module(f"array_api_compat.{namespace}")

    def array(self, values: NDArray[Any]) -> Array:
        """Copies or wraps a NumPy array on the device."""
        if self._namespace == "numpy":
            return values
        return self._torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def indices(self, values: NDArray[Any]) -> Array:
        """An integer array that can index others."""
        return self.array(values.astype(np.int64))

    def numpy(self, values: Array) -> NDArray[np.float32]:
        """Copies an array back to NumPy."""
        if self._namespace == "numpy":
            return np.ascontiguousarray(values, dtype=np.float32)
        return np.ascontiguousarray(values.cpu().numpy(), dtype=np.float32)

    def zeros(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """An array of zeros on the device; ``dtype`` is the namespace's, None is float32."""
        if self._namespace == "numpy":
            return np.zeros(shape, dtype or np.float32)
        return self._torch.zeros(shape, dtype=dtype or self._torch.float32, device=self.device)

    def cast(self, x: Array, dtype: Any = None) -> Array:
        """``x`` in another dtype, itself when it has that one; None is float32."""
        return self.xp.astype(x, dtype or self.xp.float32, copy=False)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
        mean = self.xp.mean(x * x, axis=-1, keepdims=True)
        return x / self.xp.sqrt(mean + eps) * weight

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """``x [n, in]`` times ``weight [out, in]`` transposed, plus ``bias [out]``."""
        y = x @ weight.T
        return y if bias is None else y + bias

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotates ``x [n, heads, head_dim]`` by ``cos, sin [n, dim/2]``; i pairs with i + dim/2."""
        half = cos.shape[-1]
        cos, sin = cos[:, None, :], sin[:, None, :]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = [first * cos - second * sin, second * cos + first * sin, rest]
        return self.xp.concat(turned, axis=-1)

    def softmax(self, scores: Array, visible: Array) -> Array:
        """Softmax over the last axis of the visible scores; each row sees at least one."""
        scores = self.xp.where(visible, scores, -math.inf)
        weights = self.xp.exp(scores - self.xp.max(scores, axis=-1, keepdims=True))
        return weights / self.xp.sum(weights, axis=-1, keepdims=True)

    def softcap(self, x: Array, cap: float) -> Array:
        """``cap * tanh(x / cap)``; a cap of 0 changes nothing."""
        return cap * self.xp.tanh(x / cap) if cap else x

    def activation(self, kind: Literal["silu", "gelu_tanh"], x: Array) -> Array:
        """The gate activation; gelu is the tanh approximation."""
        if kind == "silu":
            # x * sigmoid(x), as a tanh that cannot overflow
            return 0.5 * x * (1.0 + self.xp.tanh(0.5 * x))
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + self.xp.tanh(inner))


def _import_torch(device: str) -> Any:
    try:
        torch = importlib.import_module("torch")
        if device.startswith("npu"):
            importlib.import_module("torch_npu")  # registers the device
    except ModuleNotFoundError as error:
        raise DeviceUnavailableError(
            f"{error.name} is not installed; pip install 'sagellm[torch]' (and torch_npu for "
            "Ascend)"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # a driver or a library is missing
        reason = str(error).partition("\n")[0]
        raise DeviceUnavailableError(
            f"torch for device {device!r} does not load: {reason}; install versions of torch, "
            "torch_npu and the driver that belong together"
        ) from error
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceUnavailableError(
            f"torch device {device!r} cannot run here: {reason}"
        ) from error
    return torch
