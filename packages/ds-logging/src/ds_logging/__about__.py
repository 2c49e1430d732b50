"""The version of this distribution, and nothing else."""

__version__ = "0.1.0"
