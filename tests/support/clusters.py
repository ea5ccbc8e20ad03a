"""What the small servers of a test's cluster are started with."""

from __future__ import annotations

MEMBER = ("--num-layers", "2", "--cache-bytes", "16MiB", "--device", "cpu")
