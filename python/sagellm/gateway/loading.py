"""From what the command line says to a gateway with loaded models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.engine.async_engine import AsyncEngine
from sagellm.engine.config import EngineConfig
from sagellm.engine.embedding import DecoderEmbedder, is_encoder, load_embedder
from sagellm.engine.loading import load_engine
from sagellm.errors import InvalidArgumentError
from sagellm.gateway.gateway import Gateway
from sagellm.text import ChatTemplate

if TYPE_CHECKING:
    from sagellm.gateway.config import GatewayConfig

MOCK_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Lets ``--device mock`` answer conversations too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which models a gateway loads, and how.

    Attributes:
        path: The model: a .gguf file or a folder; not looked at with device ``mock``.
        name: What it is called.
        embedding_path: A second model for embeddings.
        embedding_name: What that is called.
        device, threads, precision, kv_dtype, deterministic: As for ``load_engine``.
        engine: Knobs of the generation engine.
        chat_template: Jinja source taken instead of the generation model's own.
    """

    path: str | Path
    name: str
    embedding_path: Path | None = None
    embedding_name: str = ""
    device: str = "auto"
    threads: int | None = None
    precision: str | None = None
    kv_dtype: str | None = None
    deterministic: bool = False
    engine: EngineConfig = field(default_factory=EngineConfig)
    chat_template: str | None = None


def open_gateway(config: GatewayConfig, options: ModelOptions) -> Gateway:
    """Loads the models of a gateway.

    A model that is an encoder is served for embeddings only. Without an embedding model, the
    generation model's pooled hidden states serve as embeddings.

    Raises:
        SagellmError: A model is not found, corrupt or unsupported, or memory does not suffice.
    """
    if options.device == "mock":
        engine = load_engine("", options.engine, device="mock", kv_dtype=options.kv_dtype)
        engine.chat_template = ChatTemplate(options.chat_template or MOCK_TEMPLATE)
        return Gateway(config, engine=AsyncEngine(engine), model_name=options.name)
    if is_encoder(options.path):
        if options.embedding_path is not None:
            raise InvalidArgumentError(
                f"{options.name} makes embeddings itself; leave out --embedding-model, or name a "
                "generation model as MODEL"
            )
        if options.chat_template is not None:
            raise InvalidArgumentError(
                f"{options.name} makes embeddings only; leave out --chat-template"
            )
        if options.kv_dtype is not None:
            raise InvalidArgumentError(
                f"{options.name} makes embeddings only and has no KV cache; leave out --kv-dtype"
            )
        only = load_embedder(options.path, threads=options.threads)
        return Gateway(config, embedder=only, model_name=options.name)
    engine = load_engine(
        options.path,
        options.engine,
        device=options.device,
        threads=options.threads,
        precision=options.precision,
        deterministic=options.deterministic or None,
        kv_dtype=options.kv_dtype,
    )
    try:
        if options.chat_template is not None:
            tokenizer = engine.tokenizer
            engine.chat_template = ChatTemplate(
                options.chat_template, tokenizer.bos_token, tokenizer.eos_token
            )
        encoder = None
        if options.embedding_path is not None:
            encoder = load_embedder(options.embedding_path, threads=options.threads)
    except BaseException:
        engine.close()
        raise
    runs = AsyncEngine(engine)
    return Gateway(
        config,
        engine=runs,
        embedder=encoder or DecoderEmbedder(runs),
        model_name=options.name,
        embedding_name=options.name if encoder is None else options.embedding_name,
    )
