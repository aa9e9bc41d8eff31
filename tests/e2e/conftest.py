"""The real model of the end-to-end tests, fetched through the real store."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sagellm.checkpoint import store
from sagellm.errors import SagellmError


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a model that is in the store, for this process and for its children."""
    yield from _in_store("smollm2", tmp_path_factory)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same for an embedding model."""
    yield from _in_store("minilm", tmp_path_factory)


def _in_store(model: str, folders: pytest.TempPathFactory) -> Iterator[str]:
    """Sees to it that a model is in the store until the end of the session.

    The user's store serves when it has the model. Otherwise ``SAGELLM_HOME`` is a folder of this
    session, and the model is pulled into it. A failed download fails the tests that need it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if all(found.name != model for found in store.list_models()):
            folder = folders.getbasetemp() / "sagellm-home"  # one, for all models of the session
            patch.setenv("SAGELLM_HOME", os.fspath(folder))
            try:
                if all(found.name != model for found in store.list_models()):
                    store.pull(model)
            except SagellmError as error:
                pytest.fail(f"{model} could not be pulled: {error}", pytrace=False)
        yield model
