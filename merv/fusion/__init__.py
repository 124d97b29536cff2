"""Align the grids of several encoders, project them and mix them into one sequence of tokens."""
