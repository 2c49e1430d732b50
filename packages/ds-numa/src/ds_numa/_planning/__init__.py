"""Deal out cores and memory to ranks. Pure."""
