"""``sagellm serve``: the HTTP server."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from sagellm.checkpoint.resolve import resolve_model
from sagellm.cli.options import (
    Deterministic,
    Device,
    KvCacheGb,
    KvDtype,
    Precision,
    Speculate,
    Threads,
)
from sagellm.cli.serve_options import (
    HELP,
    AllowedHost,
    ApiKey,
    ApiKeyFile,
    ChatTemplateFile,
    CorsOrigin,
    DrainNotice,
    DrainTimeout,
    EmbeddingModel,
    Host,
    LogPrompts,
    MaxModelLen,
    MaxNumSeqs,
    MaxQueue,
    MaxRequestsPerKey,
    MetricsPublic,
    Model,
    NoAccessLog,
    OtlpEndpoint,
    Port,
    ReasoningTagPair,
    RequestTimeout,
    ServedModelName,
    Socket,
    StallTimeout,
    ToolCallFormat,
)
from sagellm.engine.config import EngineConfig, parse_speculation
from sagellm.engine.memory import GIB
from sagellm.errors import InvalidArgumentError
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.lifecycle import STOP_GRACE_S
from sagellm.gateway.loading import ModelOptions, open_gateway
from sagellm.protocol import LIMITS
from sagellm.serving import Handler, log
from sagellm.terminal import pull_progress

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SWITCH_INTERVAL_S = 0.0005


def serve(
    model: Model = "smollm2",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    socket: Socket = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    served_model_name: ServedModelName = None,
    embedding_model: EmbeddingModel = None,
    chat_template: ChatTemplateFile = None,
    tool_call_format: ToolCallFormat = "auto",
    reasoning_tags: ReasoningTagPair = None,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = None,
    kv_dtype: KvDtype = None,
    kv_cache_gb: KvCacheGb = None,
    deterministic: Deterministic = False,
    speculate: Speculate = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_queue: MaxQueue = 1024,
    max_requests_per_key: MaxRequestsPerKey = None,
    request_timeout: RequestTimeout = 600.0,
    drain_timeout: DrainTimeout = 30.0,
    drain_notice: DrainNotice = 0.0,
    stall_timeout: StallTimeout = 60.0,
    cors_origin: CorsOrigin = None,
    allowed_host: AllowedHost = None,
    metrics_public: MetricsPublic = False,
    otlp_endpoint: OtlpEndpoint = None,
    no_access_log: NoAccessLog = False,
    log_prompts: LogPrompts = False,
) -> None:
    """Serves a model until a signal ends it."""
    config = GatewayConfig(
        host=host,
        port=port,
        socket=socket,
        api_keys=api_keys_of(api_key or [], api_key_file),
        served_model_name=tuple(served_model_name or ()),
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        request_timeout_s=request_timeout or None,
        drain_timeout_s=drain_timeout,
        drain_notice_s=drain_notice,
        stall_timeout_s=stall_timeout,
        max_requests_per_key=max_requests_per_key,
        tool_call_format=tool_call_format,
        reasoning_tags=None if reasoning_tags is None else _tag_pair(reasoning_tags),
        access_log=not no_access_log,
        log_prompts=log_prompts,
        metrics_public=metrics_public,
        otlp_endpoint=otlp_endpoint or None,
    )
    engine = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max(512, max_num_seqs),
        max_model_len=max_model_len,
        max_queue=max_queue,
        kv_cache_bytes=_bytes_of(kv_cache_gb),
        speculation=parse_speculation(speculate),
    )
    _configure_log()
    begun = time.perf_counter()
    gateway = open_gateway(
        config,
        replace(
            _models_of(model, embedding_model, device),
            threads=threads,
            precision=precision,
            kv_dtype=kv_dtype,
            deterministic=deterministic,
            engine=engine,
            chat_template=None if chat_template is None else read_template(chat_template),
        ),
    )
    _run(gateway, begun)


serve.__doc__ = HELP


def api_keys_of(given: list[str], path: Path | None) -> tuple[str, ...]:
    """All keys: of the command line, of the file, and of ``SAGELLM_API_KEYS``.

    Raises:
        InvalidArgumentError: The file holds no key, which would leave the server open.
    """
    keys = list(given)
    if path is not None:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise InvalidArgumentError(
                f"{path} holds no API key; write one per line, or leave out --api-key-file"
            )
        keys += found
    keys += [
        key.strip() for key in os.environ.get("SAGELLM_API_KEYS", "").split(",") if key.strip()
    ]
    return tuple(dict.fromkeys(keys))


def read_template(path: Path) -> str:
    """The text of a chat template's file.

    Raises:
        InvalidArgumentError: It is too long, empty or not text.
    """
    with path.open("rb") as file:
        data = file.read(LIMITS.template_chars + 1)
    if len(data) > LIMITS.template_chars:
        raise InvalidArgumentError(
            f"{path} has more than {LIMITS.template_chars} bytes; give the Jinja template alone"
        )
    try:
        source = data.decode()
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"{path} is not UTF-8 text; give a Jinja template") from None
    if not source.strip():
        raise InvalidArgumentError(f"{path} is empty; give a Jinja template")
    return source


def _tag_pair(text: str) -> tuple[str, str]:
    start, comma, end = text.partition(",")
    if not comma or not start or not end:
        raise InvalidArgumentError(
            f"--reasoning-tags is {text!r}; give START,END such as '<think>,</think>'"
        )
    return start, end


def _bytes_of(gib: float | None) -> int | None:
    if gib is not None and not 0 < gib < 1 << 20:
        raise InvalidArgumentError(f"--kv-cache-gb is {gib}; give GiB above 0")
    return None if gib is None else int(gib * GIB)


def _models_of(model: str, embedding_model: str | None, device: str) -> ModelOptions:
    """Finds the models, and downloads what is known but absent."""
    return ModelOptions(
        path=model if device == "mock" else _path_of(model),
        name=_name_of(model),
        embedding_path=None if embedding_model is None else _path_of(embedding_model),
        embedding_name="" if embedding_model is None else _name_of(embedding_model),
        device=device,
    )


def _path_of(model: str) -> Path:
    with pull_progress(model) as progress:
        return resolve_model(model, auto_pull=True, progress=progress)


def _name_of(model: str) -> str:
    """What clients call a model: its name in the catalogue, or that of its file or folder."""
    return Path(model).stem if Path(model).exists() else model


def _configure_log() -> None:
    log.configure(force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _run(gateway: Gateway, begun: float) -> None:
    config = gateway.config
    gc.freeze()  # vocabularies and modules stay: full passes of the collector need not see them
    # After each native step the engine's thread needs the GIL back while the event loop is busy:
    # the default of 5 ms is as long as a step of a small model.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # The gateway drains before the server does, whose own wait only lets the answers out.
    where: dict[str, object] = {"host": config.host, "port": config.port}
    if config.socket:
        where = {"socket": config.socket}
    handler = Handler(create_server(gateway), drain_timeout=STOP_GRACE_S, **where)  # type: ignore[arg-type]
    announcer = threading.Thread(target=_announce, args=(handler, gateway, begun), daemon=True)
    announcer.start()
    try:
        handler.serve()
    finally:
        sys.stdout.flush()
        if gateway.is_stuck:  # its thread would keep the process from ending
            sys.stderr.flush()
            os._exit(1)


def _announce(handler: Handler, gateway: Gateway, begun: float) -> None:
    handler.started.wait()
    config = gateway.config
    seconds = time.perf_counter() - begun
    names = ", ".join(gateway.model_names)
    sys.stderr.write(f"serving {names} on {handler.address} after {seconds:.1f} s\n")
    if not config.socket:
        sys.stderr.write(f"routes: {handler.address}/docs; Ctrl-C stops\n")
        if config.host not in _LOOPBACK and not config.api_keys:
            sys.stderr.write(
                "warning: others can reach this server and no API key is set; see --api-key-file\n"
            )
    sys.stderr.flush()
