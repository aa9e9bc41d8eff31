"""NVIDIA devices: the module ``sagellm._cuda``, what it lacks here, a self-test, and the runner."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm.backends.cpu import NativeStep, arrays_of, as_rows, native_config
from sagellm.backends.interface import StepOutput
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError, SagellmError
from sagellm.kv import create_kv_cache, plan_kv_groups

if TYPE_CHECKING:
    from sagellm.backends.interface import ForwardBatch, SamplingRow
    from sagellm.checkpoint import Checkpoint
    from sagellm.checkpoint.config import ModelConfig
    from sagellm.kv.interface import KvCache, KvGroup

logger = logging.getLogger(__name__)

KV_DTYPES = ("auto", "bf16", "f16", "int8", "fp8")


def load_cuda() -> ModuleType:
    """Imports ``sagellm._cuda``, which loads without a driver.

    Raises:
        DeviceUnavailableError: This install has none, or it does not load.
    """
    if importlib.util.find_spec("sagellm._cuda") is None:
        raise DeviceUnavailableError(
            "this install was built without CUDA; reinstall where nvcc 12.4 or newer is found "
            "(CMAKE_ARGS=-DSAGELLM_CUDA=ON makes its absence an error)"
        )
    try:
        return importlib.import_module("sagellm._cuda")
    except ImportError as error:
        raise DeviceUnavailableError(f"sagellm._cuda does not load ({error}); reinstall") from None


def probe_cuda(index: int) -> str:
    """Tells what device ``index`` is, after a product on it has come out right.

    Raises:
        DeviceUnavailableError: It cannot run the kernels; the message says why.
    """
    module = load_cuda()
    module.use_device(index)
    try:
        failure = self_test(module)
    except SagellmError as error:
        failure = str(error)
    if failure:
        raise DeviceUnavailableError(
            f"self-test on cuda:{index} failed: {failure}; check the driver with nvidia-smi, and "
            "that SAGELLM_CUDA_ARCHS of this build includes the device"
        )
    info = module.device_info(index)
    major, minor = info["compute_capability"]
    memory = info["total_bytes"] / 2**30
    return f"native kernels on {info['name']}, {major}.{minor}, {memory:.0f} GiB"


def cublas_folders() -> list[str]:
    """Folders of ``nvidia-cublas`` wheels, where the dynamic linker does not look."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package of several wheels
    roots = spec.submodule_search_locations if spec is not None else None
    places = [Path(root) / part / "lib" for root in roots or () for part in ("cu13", "cublas")]
    return [str(place) for place in places if place.is_dir()]


def self_test(module: ModuleType) -> str | None:
    """Multiplies small bfloat16 matrices on the device; returns what is wrong, or None."""
    rng = np.random.default_rng(0)
    x, weights = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((3, 64), (40, 64)))
    out = module.empty([3, 40], np.dtype(np.float32))
    x_bits, weight_bits = ((a.view(np.uint32) >> 16).astype(np.uint16) for a in (x, weights))
    module.gemm(module.array(x_bits), module.array(weight_bits), out)
    expected = np.einsum("mk,nk->mn", x, weights)  # small integers: exact in every format
    wrong = int(np.count_nonzero(out.numpy() != expected))
    return f"{wrong} of {expected.size} elements of a product are wrong" if wrong else None


class CudaRunner(NativeStep):
    """Runs a checkpoint on the kernels of ``_cuda``; a ``QueueingRunner``.

    Args:
        checkpoint: An opened model; its weights are copied to the device.
        device: Index of the device.
        max_batch_tokens: Largest number of tokens in one step.
        kv_dtype: What keys and values are stored as: ``auto`` (as the activations), ``bf16`` or
            ``f16`` where that is the activations' type, ``int8`` or ``fp8``.
        deterministic: A sequence's results do not depend on what runs beside it, bit for bit.
            Without it they repeat from run to run, and may differ from batch to batch.
        cublas: False multiplies with the project's own kernels; None takes cuBLASLt where there is
            one and says in the log when there is none.
        max_graph_sequences: Decode steps of up to so many sequences are recorded as CUDA graphs.
        module: The kernels; None imports ``sagellm._cuda``.

    Raises:
        DeviceUnavailableError: The device cannot run here or lacks memory.
        UnsupportedError: The model cannot run there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: int = 0,
        max_batch_tokens: int = 512,
        kv_dtype: str = "auto",
        deterministic: bool = False,
        cublas: bool | None = None,
        max_graph_sequences: int = 256,
        module: ModuleType | None = None,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise InvalidArgumentError(
                f"kv_dtype is {kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}"
            )
        self._module = load_cuda() if module is None else module
        self._index = device
        self._config = checkpoint.config
        self._groups = plan_kv_groups(checkpoint.config.layer_windows)
        folders = cublas_folders()
        self._decoder = self._module.model.Decoder(
            config=native_config(self._module, checkpoint.config, self._groups),
            sources=_host_tensors(checkpoint),
            device=device,
            max_batch_tokens=max_batch_tokens,
            max_graph_sequences=max_graph_sequences,
            kv_dtype=kv_dtype,
            deterministic=deterministic,
            use_cublas=not deterministic and self._use_cublas(cublas, folders),
            cublas_folders=folders,
        )
        self._check_kv_dtype(kv_dtype)

    def _use_cublas(self, wanted: bool | None, folders: list[str]) -> bool:
        if wanted is not None:
            return wanted
        try:
            self._module.CublasLt(folders)
        except DeviceUnavailableError as error:
            logger.warning("%s; the project's own kernels multiply, more slowly", error)
            return False
        return True

    def _check_kv_dtype(self, wanted: str) -> None:
        if wanted not in ("auto", self.kv_dtype):
            raise InvalidArgumentError(
                f"kv_dtype {wanted!r} does not go with this model, whose activations are "
                f"{self.kv_dtype}; choose 'auto', {self.kv_dtype!r}, 'int8' or 'fp8'"
            )

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._config

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers that share block tables."""
        return self._groups

    @property
    def device(self) -> str:
        """Such as ``cuda:0``."""
        return f"cuda:{self._index}"

    @property
    def matmul(self) -> str:
        """What multiplies: a version of cuBLASLt, or own kernels."""
        return str(self._decoder.matmul)

    @property
    def weight_bytes_per_token(self) -> int:
        """Weight bytes read to decode one token at batch 1."""
        return int(self._decoder.weight_bytes_per_token)

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of device bytes: ``weights``, ``kv``, ``workspace``."""
        return {
            "weights": int(self._decoder.weight_bytes),
            "kv": int(self._decoder.kv_bytes),
            "workspace": int(self._decoder.workspace_bytes),
        }

    @property
    def free_memory_bytes(self) -> int:
        """Bytes of the device that nobody has taken, as its driver counts them now."""
        return int(self._decoder.free_bytes)

    @property
    def kv_dtype(self) -> str:
        """``bf16``, ``f16``, ``int8`` or ``fp8``."""
        return str(self._decoder.kv_dtype)

    @property
    def graph_counts(self) -> tuple[int, int]:
        """Decode steps recorded, and how often a recording was replayed."""
        return int(self._decoder.num_graphs), int(self._decoder.graph_replays)

    @property
    def launch_seconds(self) -> float:
        """Host time of preparing and queueing the last step."""
        return float(self._decoder.launch_seconds)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV block of ``block_size`` tokens."""
        return int(self._decoder.kv_bytes_per_block(block_size))

    def launch(self, batch: ForwardBatch, sampling: tuple[SamplingRow, ...]) -> None:
        """Queues a step; see ``QueueingRunner.launch``."""
        self._decoder.launch(*arrays_of(batch), sampling, batch.token_sources)

    def finish(self) -> StepOutput:
        """Waits for the oldest queued step; see ``QueueingRunner.finish``."""
        return StepOutput(rows=as_rows(self._decoder.finish()))

    def allocate_kv(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> KvCache:
        """Creates the KV pages on the device and the cache that manages them. Called once."""
        self._decoder.allocate_kv(num_blocks, block_size)
        return create_kv_cache(
            num_blocks,
            block_size,
            tuple(group.window for group in self._groups),
            native=True,
            enable_prefix_caching=enable_prefix_caching,
        )

    def close(self) -> None:
        """Frees weights and KV pages; the runner is unusable afterwards."""
        del self._decoder


def _host_tensors(checkpoint: Checkpoint) -> list[tuple[Any, ...]]:
    """Stored tensors as the native decoder takes them: views of the mapped files."""
    tensors = []
    for name, source in checkpoint.sources.items():
        file: Any = checkpoint.files[source.file]
        info = file.tensors[source.tensor]
        tensors.append(
            (
                name,
                info.format,
                list(info.shape),
                file.raw(source.tensor),
                source.unpermute_heads,
                source.add_one,
            )
        )
    return tensors
