"""NVTX ranges: who draws them, how they look, and what they are put around."""
