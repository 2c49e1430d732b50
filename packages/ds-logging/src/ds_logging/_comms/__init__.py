"""The parts of the communication log: what is captured, what is kept of it, and how it is shown."""
