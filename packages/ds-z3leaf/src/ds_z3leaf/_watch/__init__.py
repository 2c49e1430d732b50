"""Watch a run: say why ranks that wait for each other do, and which leaf would have helped."""
