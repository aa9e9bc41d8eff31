"""The real model of the end-to-end tests, fetched through the real store."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sagellm.checkpoint import store
from sagellm.errors import SagellmError

MODEL = "smollm2"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a model that is in the store, for this process and for its children.

    The user's store serves when it has the model. Otherwise ``SAGELLM_HOME`` is a folder of this
    session, and the model is pulled into it. A failed download fails the tests that need it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if all(model.name != MODEL for model in store.list_models()):
            patch.setenv("SAGELLM_HOME", os.fspath(tmp_path_factory.mktemp("sagellm-home")))
            try:
                store.pull(MODEL)
            except SagellmError as error:
                pytest.fail(f"{MODEL} could not be pulled: {error}", pytrace=False)
        yield MODEL
