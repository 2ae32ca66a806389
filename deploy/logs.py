"""Logs: one event a line, to stderr, for a person on a terminal and as JSON for everything else.

Rule: `configure` is called once, by the entry point, before anything is logged. Everybody else
says `structlog.get_logger()`; libraries that use `logging` come out in the same form.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from metisfl.proto.errors import UserError

__all__ = ["LEVELS", "LEVEL_VARIABLE", "bind", "configure"]

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
LEVEL_VARIABLE = "METISFL_LOG_LEVEL"
HANDLER_NAME = "metisfl"


def configure(name: str, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Log as the daemon `name` to `stream` (stderr). METISFL_LOG_LEVEL, when set, beats `level`.

    Raises UserError for an unknown level.
    """
    wanted = os.environ.get(LEVEL_VARIABLE) or level
    if wanted not in LEVELS:
        raise UserError(f"log level {wanted!r}: use {', '.join(LEVELS)}")
    output = _Unfailing(sys.stderr if stream is None else stream)
    shared = _shared_processors(name)
    final = _final_processors(terminal=output.isatty())

    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[wanted]),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, output)),
        cache_logger_on_first_use=False,  # a later configure, as in tests, holds for all loggers
    )

    handler = logging.StreamHandler(output)
    handler.set_name(HANDLER_NAME)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_add_module, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    for previous in [old for old in root.handlers if old.get_name() == HANDLER_NAME]:
        root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(LEVELS[wanted])


class _Unfailing(io.TextIOBase):
    """A stream for the log: what cannot be written is dropped.

    It may be a file on a full disk, and that must not end a daemon.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def bind(
    *,
    federation: str | None = None,
    round: int | None = None,
    task: str | None = None,
    learner: str | None = None,
) -> FilteringBoundLogger:
    """Return a logger whose every line names what it is about; these four keys and no others."""
    about = {"federation": federation, "round": round, "task": task, "learner": learner}
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger.bind(**{key: value for key, value in about.items() if value is not None})


def _shared_processors(name: str) -> list[Processor]:
    def add_daemon(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["logger"] = name
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        add_daemon,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _final_processors(*, terminal: bool) -> list[Any]:
    if terminal:
        return [
            structlog.dev.ConsoleRenderer(
                colors="NO_COLOR" not in os.environ,
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]


def _add_module(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event["module"] = event["_record"].name  # `asyncio`, `zmq`: whose line it is
    return event
