"""Kernel templates: one file a kernel, written by hand in C++ headers (`../include/irc`) and called from printed code.

Every template is a module with the same five names:

- `refuses(problem, isa)`: why the template cannot do the problem, or None.
- `pack(problem, …)`: the constant operand, if there is one, in the layout that the kernel reads, as a uint8 tensor.
  The layout is the same for all instruction sets, so one artifact runs on every machine.
- `scratch_bytes(problem, num_rows, num_workers)`: bytes that `call` needs besides its operands, 64-byte aligned.
- `INCLUDES`: headers for the printed file.
- `call(problem, args, epilogue)`: C++ statements that every worker runs.

`args` are C++ expressions by name; each template's `call` lists them. `epilogue` is a C++ expression of something
callable; the template's docstring has its arguments. Results are complete after the next barrier of the workers.
"""
