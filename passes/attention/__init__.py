"""Attention: other algorithms for it, and the key-value cache."""
