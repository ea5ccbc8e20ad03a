"""The Unix socket by which clients on the same host find the engine core."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from blockdex.server.bootstrap import StartError
from blockdex.server.config import ServeSettings

_OWN, _SHARED = 0o600, 0o660


@contextlib.contextmanager
def public_socket(settings: ServeSettings) -> Iterator[list[socket.socket]]:
    """The socket of `--socket`, which listens, or none; its file is removed at the end.

    Raises:
        StartError: another server listens there, something else is there, or it cannot be made.
    """
    if settings.socket is None:
        if settings.socket_group is not None and settings.unix_path is None:
            raise StartError(f"socket_group: {settings.socket_group!r} needs --socket, or gRPC on unix:PATH")
        yield []
        return
    path = settings.socket.absolute()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listening:
        try:
            _bind(listening, path)
        except OSError as error:
            raise StartError(f"socket: cannot listen on {path}: {error.strerror or error}") from error
        made = path.stat()
        try:
            _share(path, settings.socket_group)
            listening.listen()
            listening.setblocking(False)
            yield [listening]
        finally:
            _remove(path, made)


def _bind(listening: socket.socket, path: Path) -> None:
    """Makes the file, for the server's user alone; one that a dead server has left is replaced."""
    mask = os.umask(0o777 & ~_OWN)
    try:
        try:
            listening.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            check_stale(path, "socket")
            path.unlink()
            listening.bind(str(path))
    finally:
        os.umask(mask)


def check_stale(path: Path, setting: str) -> None:
    """Makes sure that what is there is a socket which a dead server has left.

    Raises:
        StartError: it is something else, or another server listens on it.
    """
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise StartError(f"{setting}: {path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            return
    raise StartError(f"{setting}: another server listens on {path}")


def group_number(group: str) -> int:
    """Number of a group.

    Raises:
        KeyError: this machine has none of that name.
    """
    return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid


def _share(path: Path, group: str | None) -> None:
    if group is None:
        return
    try:
        shutil.chown(path, group=group_number(group))
        path.chmod(_SHARED)
    except (KeyError, OSError) as error:
        raise StartError(f"socket_group: {path} cannot be shared with {group!r}: {error}") from error


def _remove(path: Path, made: os.stat_result) -> None:
    """Unless another server has replaced it."""
    with contextlib.suppress(OSError):
        now = path.lstat()
        if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):
            path.unlink()
