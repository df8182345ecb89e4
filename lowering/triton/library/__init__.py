"""What printed kernels call: operations on elements, and tiles of products and attention."""
