"""Draw a machine, on a terminal and as a picture."""
