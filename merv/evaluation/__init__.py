"""Evaluation: answers → scores, and what they are worth. Nothing here knows a model or a benchmark."""
