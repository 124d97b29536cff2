"""Grids of several encoders to one sequence of tokens: align, project, mix."""
