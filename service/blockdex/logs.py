"""Log lines on stderr, for people or for machines: an event, its fields, and never what a tensor holds."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

LogFormat = Literal["human", "json"]
Field = str | int | float

_FIELDS = "blockdex_fields"


def log_event(logger: logging.Logger, level: int, event: str, **fields: Field) -> None:
    """Logs one event with its fields."""
    logger.log(level, event, extra={_FIELDS: fields})


def log_fault(logger: logging.Logger, event: str, fault: BaseException, **fields: Field) -> None:
    """Logs a fault of the server with its traceback."""
    logger.error(event, exc_info=fault, extra={_FIELDS: fields})


class RateLimit:
    """Lets so many lines of a kind through in each second, and counts the others."""

    def __init__(self, lines_per_second: int) -> None:
        self._lines_per_second = lines_per_second
        self._second = 0
        self._lines = 0
        self._withheld = 0

    def allows(self, now: float) -> bool:
        """Whether one more line may be written at a reading of a monotonic clock; if not, it counts as withheld."""
        if int(now) != self._second:
            self._second, self._lines = int(now), 0
        self._lines += 1
        if self._lines > self._lines_per_second:
            self._withheld += 1
        return self._lines <= self._lines_per_second

    def withheld(self) -> int:
        """Lines withheld since this was asked last."""
        withheld, self._withheld = self._withheld, 0
        return withheld


class LimitedLines(logging.Filter):
    """Lets so many lines of another library's logger through in each second; they say how many it was more."""

    def __init__(self, lines_per_second: int) -> None:
        super().__init__()
        self._limit = RateLimit(lines_per_second)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged."""
        allowed = self._limit.allows(time.monotonic())
        if allowed:
            setattr(record, _FIELDS, {"withheld": self._limit.withheld()})
        return allowed


def configure_logging(log_format: LogFormat, level: str) -> None:
    """Sends every logger of the process to stderr, one line a record.

    Args:
        log_format: `human`: time, level, event, then `field=value`; `json`: an object of the same.
        level: least level that is logged, as `logging` names it, in any case.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else HumanFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # uvicorn tells of its own start and stop at INFO; the server's lines say it already.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Logs from a level on, as `configure_logging` takes it."""
    logging.getLogger().setLevel(level.upper())


class HumanFormatter(logging.Formatter):
    """`2026-11-23T12:00:00.000Z INFO serving grpc=127.0.0.1:50051`; a traceback follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        words = [_moment(record), record.levelname, record.getMessage()]
        words += [f"{name}={_quoted(value)}" for name, value in _fields(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """An object with `time`, `level`, `logger`, `event`, the event's fields, and `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line: dict[str, Field] = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, Field]:
    fields: dict[str, Field] = getattr(record, _FIELDS, {})
    return fields


def _moment(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _quoted(value: Field) -> str:
    text = str(value)
    return text if text and not any(letter.isspace() or letter in '"=' for letter in text) else json.dumps(text)
