"""C++: headers with the kernels, templates that call them, and the printer of generated loops."""
