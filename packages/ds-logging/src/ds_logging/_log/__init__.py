"""The logger: who shows a line, where, and in which form."""
