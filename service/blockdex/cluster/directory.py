"""Where the members of a cluster are told: a list, a file, or the names of a StatefulSet's pods."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from blockdex.cluster.views import Member, View, check_views

_LOG = logging.getLogger(__name__)
_GAP = 8


class Directory(Protocol):
    """Tells the views of a cluster."""

    def views(self) -> tuple[View, ...]:
        """All views that still have live roots, the newest first; called about once a second, from a thread.

        Raises:
            OSError, ValueError: they cannot be told now, or make no sense: those before stay in force.
        """
        ...


class StaticDirectory:
    """Members that stay as they are.

    Args:
        members: addresses by name, or members.
    """

    def __init__(self, members: Mapping[str, str] | Iterable[Member]) -> None:
        if isinstance(members, Mapping):
            members = [Member(name, address) for name, address in members.items()]
        self._views = (View(1, tuple(members)),)

    def views(self) -> tuple[View, ...]:
        """The only one."""
        return self._views


class FileDirectory:
    """Views in a JSON file, which is read again when it has changed; replace it by renaming a new one over it.

    `{"cluster": "a", "views": [{"version": 2, "members": [{"name": "m0", "address": "h:50051", "weight": 1}]}]}`, the
    newest view first. The cluster's name stays: a file of another cluster in its place is refused.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._read: tuple[int, int, int] | None = None
        self._cluster: str | None = None
        self._views: tuple[View, ...] = ()

    def views(self) -> tuple[View, ...]:
        """Those of the file."""
        stat = self._path.stat()
        read = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if read != self._read:
            cluster, views = _parsed(self._path.read_text(encoding="utf-8"))
            if self._cluster not in {None, cluster}:
                raise ValueError(f"{self._path}: is of cluster {cluster!r}, was of {self._cluster!r}")
            self._read, self._cluster, self._views = read, cluster, views
        return self._views


class DnsDirectory:
    """The pods of a StatefulSet behind a headless service, in the order of their numbers.

    A pod between two that are there is a member while it restarts. Pods of higher numbers came later, so that a view of
    fewer pods is an older one.

    Args:
        pattern: of the addresses, `{}` for the number: `blockdex-{}.blockdex:50051`.
    """

    def __init__(self, pattern: str) -> None:
        if "{}" not in pattern or not pattern.rpartition(":")[2].isdigit():
            raise ValueError(f"pattern: must be HOST:PORT with {{}} in it for the pod's number, got {pattern!r}")
        self._pattern = pattern

    def views(self) -> tuple[View, ...]:
        """Of as many pods as have names, and one of each number below."""
        count = looked = 0
        while looked < count + _GAP:
            host, _, port = self._pattern.format(looked).rpartition(":")
            looked += 1
            try:
                socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            except socket.gaierror:
                continue
            count = looked
        if not count:
            raise OSError(f"{self._pattern}: none of the first {looked} names is known")
        members = [Member(str(number), self._pattern.format(number)) for number in range(count)]
        return tuple(View(size, tuple(members[:size])) for size in range(count, 0, -1))


class Watch:
    """Keeps the views of a directory at hand, in a thread of its own.

    Args:
        directory: asked at once, and every `interval` seconds from then on.
        changed: told the views when they are other ones, in the thread.
        interval: seconds.

    Attributes:
        views: the last that made sense.
        problem: why the directory's last answer was not taken; empty where it was.

    Raises:
        OSError, ValueError: the first answer.
    """

    def __init__(self, directory: Directory, changed: Callable[[tuple[View, ...]], None], interval: float) -> None:
        self._directory = directory
        self._changed = changed
        self._interval = interval
        self._ended = threading.Event()
        self.problem = ""
        self.views = check_views(directory.views())
        changed(self.views)
        threading.Thread(target=self._run, name="blockdex-directory", daemon=True).start()

    def close(self) -> None:
        """Asks no more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                self._take(check_views(self._directory.views()))
                self.problem = ""
            except Exception as failure:  # a directory may be anybody's; its views before stay in force
                if str(failure) != self.problem:
                    _LOG.warning("directory: %s", failure)
                self.problem = str(failure)

    def _take(self, views: tuple[View, ...]) -> None:
        newest, known = views[0], self.views[0]
        # The number of pods may fall again; elsewhere a lower version is a stale answer, or another directory's.
        if not isinstance(self._directory, DnsDirectory):
            if newest.version < known.version:
                raise ValueError(f"views: the newest has version {newest.version}, known is {known.version}")
            if newest.version == known.version and newest != known:
                raise ValueError(f"views: two of version {newest.version} that differ: are there two directories?")
        if views != self.views:
            self.views = views
            self._changed(views)


def _parsed(text: str) -> tuple[str, tuple[View, ...]]:
    try:
        document: Any = json.loads(text)
        views = [
            View(
                int(view["version"]),
                tuple(Member(str(m["name"]), str(m["address"]), float(m.get("weight", 1))) for m in view["members"]),
            )
            for view in document["views"]
        ]
        return str(document["cluster"]), check_views(views)
    except (KeyError, TypeError) as failure:
        raise ValueError(f"directory: misses or has in another form: {failure}") from None
