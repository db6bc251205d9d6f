"""Convolutions on several machines, over `mx.distributed`."""

from flashconv.distributed.group import (
    agree, as_group, check_same, in_order, launch, sent_after, total, total_gradients)
from flashconv.distributed.shards import (
    AllToShardedConv, ShardedToAllConv, shard_conv, shard_inplace)
from flashconv.distributed.slabs import (
    SplitConv, exchange_halo, halo_bytes, join_slabs, slab_sizes, split_slabs)
from flashconv.convert.models import SyncBatchNorm  # last: it needs the group

__all__ = [
    "AllToShardedConv", "ShardedToAllConv", "SplitConv", "SyncBatchNorm", "agree", "as_group",
    "check_same", "exchange_halo", "halo_bytes", "in_order", "join_slabs", "launch",
    "sent_after", "shard_conv", "shard_inplace", "slab_sizes", "split_slabs", "total",
    "total_gradients"]
