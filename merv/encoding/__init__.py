"""Encoders: their base class, weights, windows of frames, and creation by name."""
