"""From a model's name to an engine.

Packing weights is native work without the GIL. It begins as soon as it can: what is needed only
later (the engine, the protocol, the text side with its libraries) is imported beside it.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm import text
from sagellm.backends import create_runner
from sagellm.backends.mock import BOS_ID, EOS_ID, MockRunner, MockTokenModel
from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.config import EngineConfig
from sagellm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm.backends import ModelRunner
    from sagellm.checkpoint import TokenizerSource
    from sagellm.engine.engine import Engine
    from sagellm.text import ChatTemplate, Tokenizer


def mock_tokenizer() -> Tokenizer:
    """Bytes as tokens, for ``MockRunner``."""
    return text.Tokenizer(MockTokenModel(), bos_id=BOS_ID, eos_id=EOS_ID, prefix_ids=(BOS_ID,))


def name_of(model: str | Path) -> str:
    """What a model is called whose files do not name it."""
    return Path(model).stem if Path(model).exists() else str(model)


def load_engine(
    model: str | Path,
    config: EngineConfig | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    isa: str | None = None,
    deterministic: bool | None = None,
    kv_dtype: str | None = None,
) -> Engine:
    """Opens a model and builds an engine on it.

    Args:
        model: A catalogue name, a Hugging Face repository, a .gguf file or a folder. Not looked at
            with device ``mock``.
        config: The engine's knobs.
        device: See ``sagellm.backends.create_runner``; ``mock`` needs no files.
        threads: CPU threads; None takes all of this process.
        precision: Of activations, for devices that have a choice.
        isa: Forces an instruction-set path.
        deterministic: On a device whose answers depend on the batch otherwise (``cuda``): they do
            not. The CPU's never do.
        kv_dtype: What keys and values are stored as, for devices that have a choice.

    Raises:
        SagellmError: The model is not found, corrupt or unsupported, or memory does not suffice.
    """
    config = config or EngineConfig()
    if device == "mock":
        if kv_dtype is not None:
            raise InvalidArgumentError("device 'mock' has no option kv_dtype; leave it out")
        return _new_engine(MockRunner(), mock_tokenizer(), None, config)
    checkpoint = open_checkpoint(resolve_model(model))
    with ThreadPoolExecutor(1, thread_name_prefix="sagellm-tokenizer") as worker:
        texts = worker.submit(_load_text, checkpoint.tokenizer)
        runner = create_runner(
            checkpoint,
            device,
            threads=threads,
            max_batch_tokens=config.max_batch_tokens,
            precision=precision,
            isa=isa,
            deterministic=deterministic,
            kv_dtype=kv_dtype,
        )
        try:
            tokenizer, template = texts.result()
            return _new_engine(runner, tokenizer, template, config)
        except BaseException:
            runner.close()
            raise


def _load_text(source: TokenizerSource) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a checkpoint, and the chat template where it has one."""
    module = importlib.import_module("sagellm.engine.text_loading")
    loaded: tuple[Tokenizer, ChatTemplate | None] = module.load_text(source)
    return loaded


def _new_engine(
    runner: ModelRunner, tokenizer: Tokenizer, template: ChatTemplate | None, config: EngineConfig
) -> Engine:
    module = importlib.import_module("sagellm.engine.engine")
    engine: Engine = module.Engine(runner, tokenizer, config, chat_template=template)
    return engine
