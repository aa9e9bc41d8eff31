"""The options of ``sagellm serve`` and its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm.text.tool_formats import TOOL_CALL_FORMATS

HELP = """Serve a model over HTTP, with the APIs of OpenAI and Anthropic.

A model of the catalogue that is not on this machine yet is downloaded first. Standard output
has one JSON line per request, standard error everything else. SIGTERM and Ctrl-C let requests
at hand finish; a second one cuts them.

\b
Examples:
  sagellm serve smollm2
  sagellm serve smollm2 --host 0.0.0.0 --port 8080 --api-key-file keys.txt
  sagellm serve smollm2 --embedding-model minilm
  sagellm serve minilm
  sagellm serve ./model.gguf --served-model-name gpt-4o-mini --max-model-len 8192
  sagellm serve smollm2 --tool-call-format hermes    tools for a model without
  sagellm serve mock --device mock

\b
Ask it:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}'

\b
With the OpenAI client:
  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.chat.completions.create(
      model="smollm2", messages=[{"role": "user", "content": "Hello"}])

\b
Routes (all of them: http://127.0.0.1:8000/docs):
  /v1/chat/completions /v1/completions /v1/responses /v1/messages
  /v1/embeddings /v1/rerank /v1/models /tokenize /detokenize
  /health (restart it if not 200) /ready (send it requests) /metrics /version
"""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name from `sagellm list`, .gguf file, folder, or ORG/REPO."
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
Socket = Annotated[
    str | None, typer.Option(help="Listen on this Unix socket instead of host and port.")
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Requests need this key; repeat for several. Other users of this machine can see "
        "it: better --api-key-file, or SAGELLM_API_KEYS=KEY,KEY."
    ),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with one API key per line; # begins a comment.")
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(help="What clients call the model; repeat for aliases.  [default: MODEL]"),
]
EmbeddingModel = Annotated[
    str | None, typer.Option(help="A second model, for /v1/embeddings and /v1/rerank.")
]
ToolCallFormat = Annotated[
    str,
    typer.Option(
        help=f"How the model writes tool calls: {', '.join(TOOL_CALL_FORMATS)}; auto asks its chat "
        "template. With a name, a template without tools gets them in the system message."
    ),
]
ReasoningTagPair = Annotated[
    str | None,
    typer.Option(
        "--reasoning-tags",
        metavar="START,END",
        help="Texts around the model's reasoning.  [default: what the chat template says]",
    ),
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option("--chat-template", help="Jinja file to use instead of the model's own template."),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt and output, in tokens.  [default: the model's]"),
]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Sequences that run at once; others wait.")]
MaxQueue = Annotated[
    int, typer.Option(min=1, help="Requests that may wait; others get 429 at once.")
]
MaxRequestsPerKey = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Requests at hand of one API key (or address), else 429; each completion of one "
        "counts.  [default: with several keys half of --max-num-seqs and --max-queue, else any]",
    ),
]
RequestTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds until a request is answered 504; 0 is never.")
]
DrainTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds for requests at hand after SIGTERM.")
]
DrainNotice = Annotated[
    float,
    typer.Option(min=0, help="Seconds that /ready says 503 after SIGTERM before the end."),
]
StallTimeout = Annotated[
    float, typer.Option(help="Seconds without a step, with work, until /health says 503.")
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(help="Origin whose pages may call this server; repeat; * is every one."),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        help="Name that clients may call this server by (Host header); repeat; * is any.  "
        "[default: localhost and --host on a loopback address without API keys, else any]"
    ),
]
MetricsPublic = Annotated[bool, typer.Option("--metrics-public", help="/metrics needs no API key.")]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        help="Send OpenTelemetry spans to this collector over HTTP, such as "
        "http://127.0.0.1:4318.  [default: none]",
    ),
]
NoAccessLog = Annotated[
    bool, typer.Option("--no-access-log", help="No line per request on standard output.")
]
LogPrompts = Annotated[
    bool, typer.Option("--log-prompts", help="Put the beginning of prompts into that line.")
]
