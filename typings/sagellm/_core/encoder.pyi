"""
BERT-family encoders over ragged batches.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import sagellm._core.checkpoint
import typing
__all__: list[str] = ['Encoder', 'EncoderConfig']
class EncoderConfig:
    """
    Shape of an encoder; see sagellm.checkpoint.encoder.EncoderConfig.
    """
    has_head: bool
    def __init__(self) -> None:
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
    def num_layers(self) -> int:
        ...
    @num_layers.setter
    def num_layers(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def num_positions(self) -> int:
        ...
    @num_positions.setter
    def num_positions(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def num_token_types(self) -> int:
        ...
    @num_token_types.setter
    def num_token_types(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def position_offset(self) -> int:
        ...
    @position_offset.setter
    def position_offset(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def vocab_size(self) -> int:
        ...
    @vocab_size.setter
    def vocab_size(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
class Encoder:
    """
    Weights on all threads of a pool, one call per batch. Sequence s of a batch owns the tokens
    query_starts[s]:query_starts[s+1]. Not to be called from two threads at once.
    """
    def __init__(self, config: EncoderConfig, sources: collections.abc.Sequence[tuple[str, sagellm._core.checkpoint.File, str]], num_threads: typing.SupportsInt | typing.SupportsIndex, max_batch_tokens: typing.SupportsInt | typing.SupportsIndex, isa: str = '') -> None:
        """
        `sources`: (canonical name, file, tensor) tuples.
        """
    def embed(self, token_ids: numpy.typing.NDArray[numpy.int32], token_types: numpy.typing.NDArray[numpy.int32], query_starts: numpy.typing.NDArray[numpy.int32], pooling: str, normalize: bool) -> numpy.typing.NDArray[numpy.float32]:
        """
        Pooled states, [sequences, hidden_size]; `pooling` is "mean" or "cls".
        """
    def hidden(self, token_ids: numpy.typing.NDArray[numpy.int32], token_types: numpy.typing.NDArray[numpy.int32], query_starts: numpy.typing.NDArray[numpy.int32]) -> numpy.typing.NDArray[numpy.float32]:
        """
        The last layer's states, [tokens, hidden_size].
        """
    def score(self, token_ids: numpy.typing.NDArray[numpy.int32], token_types: numpy.typing.NDArray[numpy.int32], query_starts: numpy.typing.NDArray[numpy.int32]) -> numpy.typing.NDArray[numpy.float32]:
        """
        The cross-encoder head's output before any activation, [sequences].
        """
    @property
    def isa(self) -> str:
        ...
    @property
    def num_threads(self) -> int:
        ...
    @property
    def weight_bytes(self) -> int:
        ...
    @property
    def workspace_bytes(self) -> int:
        ...
