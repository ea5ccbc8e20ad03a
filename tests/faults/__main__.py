"""Does faults of every kind to a server whose clients check every answer; as root, since some limits are a machine's.

    cd tests && python -m faults [--each 12] [--seed 1] [--json FILE] [KIND ...]

Ends with an error where an answer was wrong, where a sequence was lost without a word, or where clients were not served
again. Prints, and writes as JSON: how many faults of each kind, and the seconds from the end of each until every client
had been answered right again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.environment import environment
from faults.run import ALL_KINDS, figures, run


def main() -> int:
    """Runs them; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(ALL_KINDS)}; all without any")
    parser.add_argument("--each", type=int, default=12, help="faults of every kind")
    parser.add_argument("--seed", type=int, default=1, help="of what is done when")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    outcome = run(options.kinds or list(ALL_KINDS), options.each, options.seed)
    result = {"environment": environment("blockdex", "grpcio"), "seed": options.seed, **figures(outcome)}
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    for wrong in outcome.wrong:
        print(wrong, file=sys.stderr)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
