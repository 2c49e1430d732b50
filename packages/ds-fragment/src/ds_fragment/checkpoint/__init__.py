"""One file from a sharded run, and back."""
