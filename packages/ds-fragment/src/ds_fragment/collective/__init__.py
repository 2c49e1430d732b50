"""Buckets of shards: packed, exchanged and unpacked, with one error for all ranks."""
