"""What a node takes, with its type: FX allows anything as an argument, an operator of this IR does not."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from irc.core.errors import IrcError


def input_node(node: fx.Node, index: int = 0) -> fx.Node:
    """The argument at a place that holds a tensor.

    Raises:
        IrcError: there is something else, which no operator of a verified program has there.
    """
    found = node.args[index]
    if not isinstance(found, fx.Node):
        raise IrcError(f"argument {index} of {node.name} is {found!r}, not a tensor")
    return found


def int_argument(node: fx.Node, index: int) -> int:
    """The argument at a place that holds a whole number (a dimension, a position in a result).

    Raises:
        IrcError: there is something else.
    """
    found = node.args[index]
    if not isinstance(found, int):
        raise IrcError(f"argument {index} of {node.name} is {found!r}, not a whole number")
    return found


def list_argument(node: fx.Node, index: int) -> list[Any]:
    """The argument at a place that holds a list (of tensors, indices or sizes).

    Raises:
        IrcError: there is something else.
    """
    found = node.args[index]
    if not isinstance(found, (list, tuple)):
        raise IrcError(f"argument {index} of {node.name} is {found!r}, not a list")
    return list(found)


def apply_op(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """What the node's operator gives for these arguments instead of its own."""
    if not callable(node.target):
        raise IrcError(f"{node.name} is no operation ({node.op} {node.target})")
    return node.target(*args, **kwargs)
