"""Commands that load when they are called: ``sagellm run`` needs no web server."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click import Command, Context, HelpFormatter

STYLE: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}
"""Settings of every typer application here."""


class Entry(NamedTuple):
    """Where a command is, and what it does.

    Attributes:
        module: Imported when the command is looked up.
        attribute: A function, or a typer application with commands of its own.
        summary: The first sentence of the command's help.
    """

    module: str
    attribute: str
    summary: str


class LazyCommands(Mapping[str, "Command"]):
    """Commands by name, loaded one by one."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Command:
        entry = self.entries[name]
        target = getattr(importlib.import_module(entry.module), entry.attribute)
        if not isinstance(target, typer.Typer):
            app = typer.Typer(**STYLE)
            app.command(name)(target)
            target = app
        command: Command = typer.main.get_command(target)
        command.name = name
        command.no_args_is_help |= any(parameter.required for parameter in command.params)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def lazy_group(entries: Mapping[str, Entry]) -> type[TyperGroup]:
    """A class of command groups, for ``typer.Typer(cls=...)``, with these commands by name."""

    class LazyGroup(TyperGroup):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.commands: Any = LazyCommands(entries)

        def list_commands(self, ctx: Context) -> list[str]:
            return list(entries)

        def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()])

    return LazyGroup
