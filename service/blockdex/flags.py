"""Flags of every command: what is misspelt is refused in one line, with what may have been meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

REFUSED = 2


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviated flags, and whose refusal is one line on stderr and status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `argparse` does, but for flags that are unknown: they are refused here, where those that are known are."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(flag, self._option_string_actions, '--')}"
            )
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(REFUSED, f"{self.prog}: {message}\n")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What to say behind a word that is unknown: the known one that is most like it, if one is, but for the prefix."""
    names = [name.removeprefix(prefix) for name in known]
    close = difflib.get_close_matches(word.removeprefix(prefix), names, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""
