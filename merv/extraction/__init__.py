"""Extraction: encode many videos once, into a feature store; and what can be done with a store."""
