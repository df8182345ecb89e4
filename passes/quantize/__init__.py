"""Quantization: weights and activations as integers with scales."""
