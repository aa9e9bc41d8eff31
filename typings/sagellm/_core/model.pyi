"""
The dense decoder over a paged KV cache.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import sagellm._core.checkpoint
import sagellm._core.kv
import typing
__all__: list[str] = ['Decoder', 'ModelConfig']
class ModelConfig:
    """
    Shape of a decoder; see sagellm.checkpoint.config.ModelConfig.
    """
    gelu_tanh: bool
    post_norms: bool
    qk_norm: bool
    qkv_bias: bool
    tie_embeddings: bool
    def __init__(self) -> None:
        ...
    def add_layer(self, window: typing.SupportsInt | typing.SupportsIndex, group: typing.SupportsInt | typing.SupportsIndex, slot: typing.SupportsInt | typing.SupportsIndex, rope: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def add_rope(self, inverse_frequencies: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], attention_factor: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    @property
    def attention_scale(self) -> float:
        ...
    @attention_scale.setter
    def attention_scale(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    @property
    def attention_softcap(self) -> float:
        ...
    @attention_softcap.setter
    def attention_softcap(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    @property
    def embedding_scale(self) -> float:
        ...
    @embedding_scale.setter
    def embedding_scale(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    @property
    def final_softcap(self) -> float:
        ...
    @final_softcap.setter
    def final_softcap(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    @property
    def head_dim(self) -> int:
        ...
    @head_dim.setter
    def head_dim(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def hidden_size(self) -> int:
        ...
    @hidden_size.setter
    def hidden_size(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def intermediate_size(self) -> int:
        ...
    @intermediate_size.setter
    def intermediate_size(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def max_position(self) -> int:
        ...
    @max_position.setter
    def max_position(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def norm_eps(self) -> float:
        ...
    @norm_eps.setter
    def norm_eps(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    @property
    def num_heads(self) -> int:
        ...
    @num_heads.setter
    def num_heads(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def num_kv_heads(self) -> int:
        ...
    @num_kv_heads.setter
    def num_kv_heads(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def vocab_size(self) -> int:
        ...
    @vocab_size.setter
    def vocab_size(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class Decoder:
    """
    Weights on all threads of a pool, one call per engine step.
    """
    def __init__(self, config: ModelConfig, sources: collections.abc.Sequence[tuple[str, sagellm._core.checkpoint.File, str, typing.SupportsInt | typing.SupportsIndex, bool]], num_threads: typing.SupportsInt | typing.SupportsIndex, max_batch_tokens: typing.SupportsInt | typing.SupportsIndex, accurate: bool = False, isa: str = '') -> None:
        """
        `sources`: (canonical name, file, tensor, unpermute_heads, add_one) tuples. `accurate` selects 15-bit
        activations for quantized weights.
        """
    def attach_kv(self, storage: sagellm._core.kv.KvStorage) -> None:
        ...
    def phase_times(self) -> dict:
        """
        Of the steps since then: {"steps", "seconds" inside `step`, "threads": per thread {phase: seconds},
        which add up to "seconds"}.
        """
    def step(self, token_ids: numpy.typing.NDArray[numpy.int32], positions: numpy.typing.NDArray[numpy.int32], query_starts: numpy.typing.NDArray[numpy.int32], block_tables: numpy.typing.NDArray[numpy.int32], block_copies: numpy.typing.NDArray[numpy.int32], logit_rows: numpy.typing.NDArray[numpy.int32], sampling: collections.abc.Sequence, return_logits: bool = False, return_hidden: bool = False) -> tuple:
        """
        Runs one step; returns (rows, logits | None, hidden | None). Rows are tuples (token_id,
        logprob | None, top_ids, top_logprobs, error | None), one per entry of `sampling`.
        Hidden states are those after the final norm.
        """
    def time_phases(self, enabled: bool) -> None:
        """
        Starts timing the phases of steps from zero, or stops. Not while a step runs.
        """
    @property
    def isa(self) -> str:
        ...
    @property
    def last_head_blocks(self) -> int:
        """
        Row blocks (of 16) of the output head that the last step computed.
        """
    @property
    def num_threads(self) -> int:
        ...
    @property
    def weight_bytes(self) -> int:
        ...
    @property
    def weight_bytes_per_token(self) -> int:
        ...
    @property
    def workspace_bytes(self) -> int:
        ...
