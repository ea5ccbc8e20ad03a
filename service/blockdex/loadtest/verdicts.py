"""What a result comes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blockdex.loadtest.wording import counted, duration

LONGER = "Longer sequences test it: fewer --clients, or a server with more room (--cache-bytes, fewer --num-layers)."
"""What to do where every answer was of a whole sequence."""


def has_outage(result: dict[str, Any]) -> bool:
    """Whether nothing was answered for longer than is allowed."""
    return bool(result["outages"]["longest"] > result["outages"]["bound"])


def is_untested(result: dict[str, Any]) -> bool:
    """Whether answers were to be checked and none of those looked at had left a block out."""
    return bool(result["settings"]["check_share"] and not result["checks"]["checked"])


def verdicts(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is to be known first: how grave (`good`, `warn`, `bad`), and words."""
    yield from _of_answers(result)
    if seconds := result["outages"]["seconds"]:
        window = duration(result["window"]["seconds"])
        yield "bad" if has_outage(result) else "warn", f"{duration(seconds)} of {window} without an answer"
    if result["server"]["same_epoch"] is False:
        yield "warn", "the server started anew"
    if result["slos"]:
        missed = sum(not slo["met"] for slo in result["slos"])
        yield ("bad", f"{missed} of {len(result['slos'])} objectives missed") if missed else ("good", "objectives met")
    for count, noun, words in (
        (result["all"]["errors"], "error", ""),
        (result["set_up_errors"], "error", " while clients started over"),
        (result["unsent"], "arrival", " unsent"),
        (result["left_open"], "sequence", " left open"),
    ):
        if count:
            yield "bad", counted(count, noun) + words
    if result["window"]["interrupted"]:
        yield "warn", "interrupted"
    if result["ceiling"] and result["ceiling"]["near"]:
        yield "warn", "near the load test's own ceiling"


def _of_answers(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if wrong := len(result["checks"]["wrong"]):
        yield "bad", counted(wrong, "wrong answer")
    elif result["checks"]["checked"]:
        yield "good", "answers right"
    elif is_untested(result):
        yield "bad", "no selection was tested"
    else:
        yield "warn", "answers not checked"
