"""What measurements say: medians, spreads, ratios, shares of the bandwidth probe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sagellm.bench import report
from sagellm.bench.compare import plan as planned
from sagellm.bench.compare.plan import SAGELLM, Case, Entrant, Group
from sagellm.bench.compare.run import Comparison, Measurement

BUSY_SHARE = 0.05  # of all CPU time used by others: worth a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of one entrant over the rounds.

    Attributes:
        ratio: How many times better sagellm is: the median over the rounds of the quotient within
            a round, turned so that above 1 is better for sagellm. None for sagellm itself.
        ratio_low, ratio_high: The least and the largest of those quotients.
        probe_percent: Bytes read per second as a share of the probe of the same round, median.
    """

    entrant: str
    median: float
    low: float
    high: float
    runs: tuple[float, ...]
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    probe_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of all entrants of a group.

    Attributes:
        figures: By entrants' titles; who has none is missing.
        strongest: Title of the best peer, None where no peer has the figure.
    """

    name: str
    lower_is_better: bool
    figures: dict[str, Figure]
    strongest: str | None

    @property
    def ratio(self) -> float | None:
        """Against the strongest peer."""
        return None if self.strongest is None else self.figures[self.strongest].ratio


def rows(comparison: Comparison, group: Group) -> list[Row]:
    """The table of a group."""
    names = [case.name for case in _by_kind(comparison.plan.cases)]
    result = []
    for name in (*names, planned.START, planned.MEMORY):
        lower = name in (planned.START, planned.MEMORY)
        figures: dict[str, Figure] = {}
        for entrant in group.entrants:
            figure = _figure(comparison, group, entrant, name, lower_is_better=lower)
            if figure is not None:
                figures[entrant.title] = figure
        peers = [figure for figure in figures.values() if figure.entrant != _own(group).title]
        best = min if lower else max
        strongest = best(peers, key=lambda figure: figure.median).entrant if peers else None
        result.append(Row(name=name, lower_is_better=lower, figures=figures, strongest=strongest))
    return result


def probes(comparison: Comparison, group: Group) -> list[float]:
    """The bandwidth probes of a group's rounds, in GB/s."""
    own = _measurements(comparison, _own(group)).values()
    return [probe for one in own if (probe := _probe(one)) is not None]


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know before trusting the figures."""
    plan = comparison.plan
    found = [f"{absent.engine} is absent: {absent.reason}" for absent in plan.absent]
    found += plan.notes
    for one in comparison.rounds:
        if not one.was_idle:
            by = f" ({', '.join(one.busiest)})" if one.busiest else ""
            found.append(
                f"round {one.index + 1} began on a busy machine, {_percent(one.load)} of its CPU "
                f"time in use{by}; allowed by --allow-busy"
            )
    titles = {
        (entrant.engine, entrant.model): entrant.title
        for group in plan.groups
        for entrant in group.entrants
    }
    with_values = {(one.engine, one.model) for one in comparison.measurements if one.values}
    found += [
        f"{entrant.title} was kept from round to round: its start and peak memory were measured "
        "once, and its memory stayed taken while others were measured"
        for entrant in dict.fromkeys(one for group in plan.groups for one in group.entrants)
        if entrant.keep and (entrant.engine, entrant.model) in with_values
    ]
    for measured in comparison.measurements:
        title = titles[measured.engine, measured.model]
        if measured.failure is not None:
            found.append(f"round {measured.round + 1}: {title} failed: {measured.failure}")
        if measured.foreign_cpu > BUSY_SHARE:
            found.append(
                f"round {measured.round + 1}: others used {_percent(measured.foreign_cpu)} of the "
                f"CPU time while {title} was measured"
            )
    if comparison.stopped is not None:
        found.append(f"stopped after round {len(comparison.rounds)}: {comparison.stopped}")
    if comparison.interrupted:
        found.append("interrupted: figures of what was complete")
    return found


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Measurements and derived figures as one object."""
    tables = []
    for group in comparison.plan.groups:
        table = [
            {
                "name": row.name,
                "lower_is_better": row.lower_is_better,
                "strongest_peer": row.strongest,
                "ratio_to_strongest": row.ratio,
                "figures": [asdict(figure) for figure in row.figures.values()],
            }
            for row in rows(comparison, group)
        ]
        tables.append(
            {"label": group.label, "probe_gbps": probes(comparison, group), "rows": table}
        )
    return {**comparison.to_json(), "tables": tables, "notes": notes(comparison)}


def _figure(
    comparison: Comparison, group: Group, entrant: Entrant, name: str, *, lower_is_better: bool
) -> Figure | None:
    theirs = _measurements(comparison, entrant)
    ours = _measurements(comparison, _own(group))
    runs = [one.values[name] for one in theirs.values() if name in one.values]
    if not runs:
        return None
    ratios = []
    percents = []
    for index, one in theirs.items():
        own = ours.get(index)
        if own is None or name not in one.values:
            continue
        if name in own.values and entrant != _own(group):
            ours_per_theirs = own.values[name] / one.values[name]
            ratios.append(1 / ours_per_theirs if lower_is_better else ours_per_theirs)
        source = own if entrant.reads_as_stored else one
        size, probe = source.bytes_per_token.get(name), _probe(own)
        if size is not None and probe is not None:
            percents.append(100 * one.values[name] * size / 1e9 / probe)
    return Figure(
        entrant=entrant.title,
        median=report.median(runs),
        low=min(runs),
        high=max(runs),
        runs=tuple(runs),
        ratio=report.median(ratios) if ratios else None,
        ratio_low=min(ratios, default=None),
        ratio_high=max(ratios, default=None),
        probe_percent=report.median(percents) if percents else None,
    )


def _measurements(comparison: Comparison, entrant: Entrant) -> dict[int, Measurement]:
    """By round."""
    return {
        one.round: one
        for one in comparison.measurements
        if (one.engine, one.model) == (entrant.engine, entrant.model)
    }


def _own(group: Group) -> Entrant:
    return next(entrant for entrant in group.entrants if entrant.engine == SAGELLM)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _probe(measurement: Measurement) -> float | None:
    return measurement.facts.get("probe_gbps")


def _by_kind(cases: tuple[Case, ...]) -> list[Case]:
    return sorted(cases, key=lambda case: (case.kind != "prefill", case.streams))
