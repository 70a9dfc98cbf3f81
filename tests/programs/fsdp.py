"""FSDP2, where this torch has it."""

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before 2.6
    from torch.distributed._composable.fsdp import fully_shard

__all__ = ["fully_shard"]
