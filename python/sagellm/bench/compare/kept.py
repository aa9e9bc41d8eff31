"""Drivers that live from turn to turn, stopped while others are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

from sagellm.bench.compare.driver_process import DriverProcess, started
from sagellm.bench.compare.plan import Entrant


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    driver: DriverProcess
    owner: ExitStack  # ends it
    cpu_seconds: float  # when it was paused


class KeptDrivers:
    """The processes of a comparison that outlive their turn; leaving the context ends them."""

    def __init__(self) -> None:
        self._kept: dict[Entrant, _Kept] = {}

    def __enter__(self) -> KeptDrivers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as all_of_them:  # each is ended, whatever happens to the others
            for kept in self._kept.values():
                all_of_them.push(kept.owner)

    def has(self, entrant: Entrant) -> bool:
        """Whether a driver waits for its next turn; one that has died is forgotten."""
        if entrant in self._kept and self._kept[entrant].driver.has_ended():
            self.end(entrant)
        return entrant in self._kept

    def end(self, entrant: Entrant) -> None:
        """Ends a driver, if there is one."""
        if entrant in self._kept:
            self._kept[entrant].owner.close()
            del self._kept[entrant]

    def cpu_seconds(self) -> float:
        """Used so far by those that wait."""
        return sum(kept.cpu_seconds for kept in self._kept.values())

    @contextmanager
    def turn(
        self, entrant: Entrant, command: Sequence[str], environment: Mapping[str, str], seed: int
    ) -> Iterator[DriverProcess]:
        """The driver of one turn, the kept one or a new one; ended unless it is to be kept.

        Args:
            entrant: Whose turn it is.
            command: Starts a new one.
            environment: Of a new one.
            seed: For the prompts of a kept one; the command has that of a new one.
        """
        kept = self._kept[entrant] if self.has(entrant) else None
        with ExitStack() if kept is None else kept.owner as owner:
            if kept is None:
                driver = owner.enter_context(started(command, environment))
            else:
                driver = kept.driver
                driver.again(seed)
            yield driver
            if entrant.keep:
                driver.pause()
                used = driver.cpu_seconds()
                self._kept[entrant] = _Kept(driver=driver, owner=owner.pop_all(), cpu_seconds=used)
            else:
                driver.finish()
