"""Saved models: their folder format, the hub, model cards, averages."""
