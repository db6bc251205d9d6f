"""Convolutions on several machines, over `mx.distributed`."""

from flashconv.distributed.group import (
    after, agree, as_group, check_same, in_order, launch, total)
from flashconv.distributed.slabs import (
    SplitConv, exchange_halo, halo_bytes, join_slabs, slab_sizes, split_slabs)

__all__ = [
    "SplitConv", "exchange_halo", "halo_bytes", "join_slabs", "slab_sizes", "split_slabs", "after",
    "agree", "as_group", "check_same", "in_order", "launch", "total"]
