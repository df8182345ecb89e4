"""Speculative decoding: guesses of the next tokens, verified by one step of the model."""
