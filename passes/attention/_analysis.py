"""Everything the insertion of a cache needs to know about a program, found before anything is edited."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from irc.core.errors import PassError
from irc.core.program import Program
from irc.core.slices import data_dependent
from irc.passes.attention._per_position import Refusal, Token, Walk
from irc.passes.attention._per_position_rules import rule_for
from irc.passes.attention._position_tables import DEFAULT_LENGTH, Tables, longest_table
from irc.passes.attention._sequence import Sequence, attention_nodes, find_sequence

_MASKS = ("causal", "sliding", "chunked")


@dataclass
class Analysis:
    """A program that works per position (if `problems` is empty) and how."""

    sequence: Sequence
    attentions: list[fx.Node]
    walk: Walk
    tables: Tables
    problems: list[str]


def analyze(program: Program, max_length: int | None, tokens: str | None = None) -> Analysis:
    """Walk the program; problems are collected, not raised.

    Raises:
        PassError: there is no sequence to analyze (no attention, fixed length, encoder-decoder).
    """
    sequence = find_sequence(program, tokens)
    data = data_dependent(program)
    problems: list[str] = []
    length = _length(program, sequence, data, max_length, problems)
    tables = Tables(program, sequence, data, length)

    def attention(walk: Walk, node: fx.Node) -> Token:
        return _attention(walk, tables, node)

    walk = Walk(program, sequence, data, tables.operand, tables.identity, attention, rule_for)
    walk.layouts[sequence.tokens] = Token(sequence.axis)
    extra = [str(n.target) for n in program.placeholders if n is not sequence.tokens and n.users]
    if extra:
        problems.append(
            f"inputs besides the tokens ({sequence.tokens.target}): {', '.join(extra)}."
            " Capture the model with its tokens alone; masks and positions follow from the cache"
        )
        walk.poisoned.update(n for n in program.placeholders if n is not sequence.tokens)
    walk.run()
    problems += [
        f"{p.node} at {p.location}: {p.reason}" if p.location else f"{p.node}: {p.reason}" for p in walk.problems
    ]
    outputs = program.outputs
    if len(outputs) != 1 or outputs[0] not in data:
        problems.append(f"a step gives one output that depends on the tokens, this program gives {len(outputs)}")
    return Analysis(sequence, attention_nodes(program), walk, tables, problems)


def _length(
    program: Program, sequence: Sequence, data: set[fx.Node], max_length: int | None, problems: list[str]
) -> int:
    wanted = max_length or max(DEFAULT_LENGTH, sequence.dim.hint)
    if sequence.dim.maximum is not None:
        wanted = min(wanted, sequence.dim.maximum)
    length = longest_table(program, sequence, data, wanted)
    if max_length is not None and length < max_length:
        problems.append(f"max_length={max_length} is more than the model has positions for: at most {length}")
    return length


def _attention(walk: Walk, tables: Tables, node: fx.Node) -> Token:
    """Attention may mix positions, provided that no query sees a later key."""
    sequence, kwargs = walk.sequence, node.kwargs
    for label, operand in zip(("query", "key", "value"), node.args[:3], strict=True):
        if not isinstance(operand, fx.Node) or operand not in walk.data:
            raise Refusal(f"has a {label} that does not depend on the tokens")
        shape = walk.shape(operand)
        if walk.layout(operand) != Token(2) or shape[2] != sequence.symbol or shape[0] != sequence.batch_expr:
            raise Refusal(f"has a {label} {list(shape)} that is not [batch, heads, {sequence.name}, width]")
    bias, sinks, mask = kwargs.get("bias"), kwargs.get("sinks"), kwargs.get("mask", "full")
    for label, extra in (("bias", bias), ("sinks", sinks)):
        if isinstance(extra, fx.Node) and extra in walk.data:
            raise Refusal(f"has {label} that depend on the data ({extra.name}), unknown for the keys to come")
    table = tables.bias(bias, shiftable=sinks is None) if isinstance(bias, fx.Node) else None
    if mask not in _MASKS and not (table is not None and table.causal):
        raise Refusal("is bidirectional: every position sees later ones, which a cache cannot hold yet")
    return Token(2)


def require(analysis: Analysis) -> None:
    """Raise all problems at once."""
    if analysis.problems:
        raise PassError("the program does not work per position:\n  " + "\n  ".join(analysis.problems))
