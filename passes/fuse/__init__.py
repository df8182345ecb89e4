"""Fusions: fewer, larger operations with the same result."""
