"""The cache's bookkeeping: pages, sequences, tenants, leases. Knows numbers, not keys."""

from blockdex.cache.cache import Cache
from blockdex.cache.pages import PageCopy
from blockdex.cache.plan import AppendPlan
from blockdex.cache.sequence import Sequence

__all__ = ["AppendPlan", "Cache", "PageCopy", "Sequence"]
