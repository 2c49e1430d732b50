"""Timers on events of a device or on the host's clock."""
