"""The core of the compiler: IR, operators, pass contract, manager, rewriting.

Knows no pass and no target by name; they register. Everything outside `irc/core` may import
from here, never the reverse.
"""
