"""
The sampler.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
__all__: list[str] = ['sample_rows']
def sample_rows(logits: numpy.typing.NDArray[numpy.float32], rows: collections.abc.Sequence, isa: str = 'generic') -> tuple:
    """
    Samples one token per row of logits [R, vocab]; `rows` are SamplingRow objects. Returns tuples
    (token_id, logprob | None, top_ids, top_logprobs, error | None).
    """
