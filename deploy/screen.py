"""The two screens of the driver: a live table on a terminal, plain lines everywhere else.

Rule: both go to stderr; stdout is for what a program would read.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from google.protobuf.message import Message

from metisfl.deploy.view import View, lines, readable_bytes, shown_metric

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LineScreen", "Screen", "TableScreen", "screen_for"]


class Screen(Protocol):
    def __enter__(self) -> Screen: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        """An event has come (or a beat, which no log has: its time is 0)."""

    def say(self, text: str) -> None:
        """One line about the run that is no event."""


def screen_for(view: View) -> Screen:
    """Choose: a terminal with rich installed gets the table."""
    if sys.stderr.isatty():
        try:
            import rich  # noqa: F401
        except ImportError:
            return LineScreen()
        return TableScreen(view)
    return LineScreen()


class LineScreen:
    """Prints a line when something worth one has happened."""

    def __enter__(self) -> LineScreen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        for line in lines(before, message):
            self.say(line)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class TableScreen:
    """Keeps a table of the learners up to date at the bottom of the terminal."""

    def __init__(self, view: View) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(_table(view), console=Console(stderr=True), refresh_per_second=8)

    def __enter__(self) -> TableScreen:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        self._live.update(_table(after))

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)


def _table(view: View) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    title = f"round {view.round} of {view.rounds}"
    if view.waits_for:
        title += f" · waiting for {view.waits_for}"
    if text := shown_metric(view):
        title += f" · {text}"
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for heading in ("learner", "state", "progress", "sent", "loss", "accuracy"):
        table.add_column(heading, justify="left" if heading in ("learner", "state") else "right")
    for name, learner in view.learners.items():
        table.add_row(
            name,
            learner.state,
            ProgressBar(total=1.0, completed=learner.fraction, width=16),
            readable_bytes(learner.update_bytes),
            _metric(learner.metrics, "loss"),
            _metric(learner.metrics, "accuracy"),
        )
    return table


def _metric(metrics: object, name: str) -> str:
    assert hasattr(metrics, "get")
    value = metrics.get(name, metrics.get(f"test.{name}"))
    return "" if value is None else f"{value:.3f}"
