"""The hang explainer: what every rank is doing, asked through the store, and what follows from it."""
