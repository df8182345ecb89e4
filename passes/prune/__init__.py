"""Passes that take parts of a model away."""
