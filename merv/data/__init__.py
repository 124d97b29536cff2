"""Rows of files to batches: reading, checking, their order, the place in it."""
