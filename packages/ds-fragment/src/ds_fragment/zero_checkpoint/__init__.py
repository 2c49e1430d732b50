"""The folders that DeepSpeed's `save_checkpoint` writes, read without DeepSpeed."""

from ds_fragment.zero_checkpoint.consolidate import Summary, consolidate, iter_zero_checkpoint

__all__ = ["Summary", "consolidate", "iter_zero_checkpoint"]
