"""Log lines: an event and its fields, for people or for machines."""

from __future__ import annotations

import json
import logging
import sys

from blockdex.logs import HumanFormatter, JsonFormatter, RateLimit


def record(event: str, **fields: str | int | float) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {
            "name": "blockdex.server.main",
            "levelno": logging.INFO,
            "levelname": "INFO",
            "msg": event,
            "blockdex_fields": fields,
        }
    )
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_a_line_for_people_quotes_what_would_be_read_wrongly() -> None:
    line = HumanFormatter().format(record("serving", grpc="127.0.0.1:1", why="two words", empty="", sign="a=b", n=3))
    assert line == ('2023-11-14T22:13:20.250Z INFO serving grpc=127.0.0.1:1 why="two words" empty="" sign="a=b" n=3')


def test_a_line_for_machines_is_one_object() -> None:
    line = JsonFormatter().format(record("serving", why="two\nlines", n=3))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "blockdex.server.main",
        "event": "serving",
        "why": "two\nlines",
        "n": 3,
    }


def test_an_exception_stays_on_the_line_of_its_record() -> None:
    failed = record("failed")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        failed.exc_info = sys.exc_info()
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert "RuntimeError: broken" in json.loads(line)["exception"]


def test_lines_beyond_the_limit_are_counted_until_somebody_asks() -> None:
    limit = RateLimit(2)
    assert [limit.allows(7.0 + step / 10) for step in range(4)] == [True, True, False, False]
    assert [limit.allows(8.0), limit.allows(8.9), limit.allows(8.99)] == [True, True, False]
    assert (limit.withheld(), limit.withheld()) == (3, 0)
    assert limit.allows(9.0)
