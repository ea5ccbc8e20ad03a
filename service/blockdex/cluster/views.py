"""Members of a cluster, and the views that its directory keeps of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from blockdex.cluster.rendezvous import owners


@dataclass(frozen=True, slots=True)
class Member:
    """A server of the cluster.

    Attributes:
        name: that it keeps when it restarts; what is hashed.
        address: of its gRPC, as `Client` takes it.
        weight: its share of new roots beside those of the others; 0: it keeps what it has and gets nothing new.
    """

    name: str
    address: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or not self.address:
            raise ValueError(f"member: needs a name and an address, got {self.name!r} and {self.address!r}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"member {self.name}: weight must be a finite number, at least 0, got {self.weight}")


@dataclass(frozen=True, slots=True)
class View:
    """The members at one time.

    Attributes:
        version: higher in a later view.
        members: no two of one name; at least one has a weight.
    """

    version: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"view {self.version}: two members of one name among {', '.join(sorted(names))}")
        if not any(member.weight for member in self.members):
            raise ValueError(f"view {self.version}: none of its {len(names)} members has a weight above 0")

    def owner(self, tenant: str, root: int) -> str:
        """The name of the member that a root goes to."""
        names = [member.name for member in self.members]
        place = owners(tenant, [root], names, [member.weight for member in self.members])[0]
        return names[int(place)]


def check_views(views: Sequence[View]) -> tuple[View, ...]:
    """Views as a directory tells them.

    Raises:
        ValueError: there is none, or their versions do not fall.
    """
    versions = [view.version for view in views]
    if not versions or any(later <= earlier for later, earlier in pairwise(versions)):
        raise ValueError(f"views: must be at least one, newest first, got versions {versions}")
    return tuple(views)
