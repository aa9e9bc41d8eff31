"""Chat templates: messages to prompt text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS
from sagellm.text.metered_sandbox import MAX_VALUE_SIZE, MeteredEnvironment, metered


class ChatTemplate:
    """A Jinja chat template, compiled once. Safe to share between threads.

    The dialect is that of Hugging Face tokenizers: trimmed blocks, loop controls,
    ``raise_exception``, ``strftime_now``, ``tojson``, ``{% generation %}``. Time, memory and output
    are bounded; see ``sagellm.text.metered_sandbox``.

    Args:
        source: The template.
        bos_token, eos_token: What the template's variables of these names hold.

    Attributes:
        source: The template's text.

    Raises:
        InvalidArgumentError: The template is too long or not valid.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > LIMITS.template_chars:
            raise InvalidArgumentError(
                f"the chat template has {len(source)} characters; at most {LIMITS.template_chars}"
            )
        try:
            self._template = MeteredEnvironment().from_string(source)
        except Exception as error:  # compiling untrusted code may fail in any way
            raise InvalidArgumentError(f"the chat template is not valid: {error}") from error
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def uses(self, variable: str) -> bool:
        """Whether the template's code names a variable, such as ``tools``."""
        names = MeteredEnvironment().parse(self.source).find_all(nodes.Name)
        return any(name.name == variable for name in names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation.

        Args:
            messages: Turns, each with at least ``role`` and ``content``.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: Descriptions of tools, for templates that know them.
            **kwargs: Further variables of the template.

        Returns:
            Text to encode with ``add_special=False, parse_special=True``.

        Raises:
            InvalidArgumentError: The template fails, refuses the messages, or exceeds its bounds.
        """
        variables: dict[str, Any] = {
            **kwargs,
            **self._tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [dict(tool) for tool in tools],
        }
        pieces: list[str] = []
        size = 0
        try:
            with metered():
                for piece in self._template.generate(variables):
                    size += len(piece)
                    if size > MAX_VALUE_SIZE:
                        raise InvalidArgumentError(
                            f"the conversation exceeds {MAX_VALUE_SIZE} characters; send less"
                        )
                    pieces.append(piece)
        except InvalidArgumentError:
            raise
        except Exception as error:  # running untrusted code may fail in any way
            raise InvalidArgumentError(
                f"the chat template failed on these messages: {error or type(error).__name__}"
            ) from error
        return "".join(pieces)
