"""Rehearsal: run a few batches, record which modules each rank calls in which order, and choose leaves from it."""
