"""The cache's bookkeeping: pages, sequences, tenants, leases. Knows numbers, not keys."""

from blockdex.cache.index_cache import IndexCache, SequenceColumns
from blockdex.cache.page_pool import PageCopy
from blockdex.cache.page_table import ROW as TABLE_ROW
from blockdex.cache.sequence import Sequence

__all__ = ["TABLE_ROW", "IndexCache", "PageCopy", "Sequence", "SequenceColumns"]
