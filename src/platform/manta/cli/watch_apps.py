"""`manta apps --watch`: how each application does, as it changes."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from manta.cli import output

if TYPE_CHECKING:
    from rich.table import Table

    from manta.cluster.record import ClusterRecord
    from manta.serving.apps.plan import App
    from manta.serving.telemetry.live import Live

POLL_S = 5.0
COLUMNS = (
    *("APP", "STATUS", "REPLICAS", "REQUESTS/S", "IN FLIGHT", "TTFT P50", "TTFT P99"),
    *("TOKENS/S", "ERRORS/S", "REFUSED/S"),
)


def once(cluster: ClusterRecord) -> None:
    """Print JSON of how applications did in the last seconds; takes two of Ray's reports."""
    from manta.serving.apps import deploy
    from manta.serving.telemetry import live

    first = live.sample(cluster)
    time.sleep(live.REPORT_S + POLL_S)
    found = live.between(first, live.sample(cluster))
    apps = deploy.state(cluster).apps
    output.print_json([_facts(app, found.get(app.name)) for app in apps])


def follow(cluster: ClusterRecord) -> None:
    """Show a table until Ctrl-C: on a terminal in place, elsewhere one below the other."""
    from manta.serving.apps import deploy
    from manta.serving.telemetry import live

    samples = deque([live.sample(cluster)], maxlen=int(2 * live.REPORT_S / POLL_S) + 1)
    output.say("figures of the last 20 s; Ray tells every 10 s. Ctrl-C ends this")
    show = _Screen() if sys.stdout.isatty() else _Lines()
    try:
        while True:
            found = live.between(samples[0], samples[-1])
            show.rows([_row(app, found.get(app.name)) for app in deploy.state(cluster).apps])
            time.sleep(POLL_S)
            samples.append(live.sample(cluster))
    except KeyboardInterrupt:
        show.end()


class _Lines:
    def rows(self, rows: list[tuple[object, ...]]) -> None:
        output.print_table(COLUMNS, rows)
        sys.stdout.flush()

    def end(self) -> None:
        pass


class _Screen(_Lines):
    def __init__(self) -> None:
        from rich.live import Live as Shown

        self._shown = Shown(auto_refresh=False)
        self._shown.start()

    def rows(self, rows: list[tuple[object, ...]]) -> None:
        self._shown.update(_table(rows), refresh=True)

    def end(self) -> None:
        self._shown.stop()


def _table(rows: list[tuple[object, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _facts(app: App, found: Live | None) -> dict[str, object]:
    running = sum(one.num_replicas for one in app.deployments)
    figures = asdict(found) if found else None
    return {"name": app.name, "status": app.status, "num_replicas": running, "live": figures}


def _row(app: App, found: Live | None) -> tuple[object, ...]:
    running = sum(one.num_replicas for one in app.deployments)
    wanted = sum(one.target_num_replicas for one in app.deployments)
    first = (app.name, app.status, f"{running} of {wanted}")
    if found is None:  # nothing told yet, or an application without the guard
        return (*first, *("-" for _ in COLUMNS[len(first) :]))
    return (
        *first,
        f"{found.requests_per_s:.1f}",
        f"{found.in_flight:.0f}",
        _seconds(found.ttft_p50_s),
        _seconds(found.ttft_p99_s),
        f"{found.tokens_per_s:.0f}",
        f"{found.failed_per_s:.1f}",
        f"{found.refused_per_s:.1f}",
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
