"""NCCL on one device: a clique of one rank, which uses every call."""

from __future__ import annotations

import numpy as np
import pytest

from sagellm.backends.nccl import nccl_folders
from sagellm.errors import DeviceUnavailableError


@pytest.mark.cuda
def test_a_clique_of_one_gets_back_what_it_gives() -> None:
    module = pytest.importorskip("sagellm._cuda", reason="sagellm._cuda is not built")
    count, reason = module.probe()
    if count == 0:
        pytest.skip(reason)
    try:
        library = module.Nccl(nccl_folders())
    except DeviceUnavailableError as error:
        pytest.skip(str(error))
    module.use_device(0)
    alone = module.Communicator(library, library.make_id(), 0, 1)
    values = np.arange(1000, dtype=np.float32)
    x = module.array(values)
    for move in (alone.all_reduce, alone.reduce_scatter, alone.all_gather):
        out = module.empty([1000], np.dtype(np.float32))
        move(x, out)
        assert np.array_equal(out.numpy(), values)
    out = module.empty([1000], np.dtype(np.float32))

    def to_itself() -> None:
        alone.send(x, 0)
        alone.receive(out, 0)

    alone.group(to_itself)
    alone.broadcast(out, root=0)
    assert np.array_equal(out.numpy(), values)
    assert alone.async_error() == ""
    alone.finish()
