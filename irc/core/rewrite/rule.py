"""`RewriteRule`: pattern, check and replacement as plain Python functions; usable directly as a pass.

    def pattern(x, w, eps: float):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w

    def replacement(x, w, eps: float):
        return torch.ops.irc.rms_norm(x, w, eps)

    fuse = RewriteRule(name="fuse-my-norm", pattern=pattern, replacement=replacement)
    irc.compile(model, passes=[fuse])

A parameter stands for any tensor; annotated `float`, `int`, `bool`, `str`, `torch.dtype` or `object` it
stands for a constant, which the match binds as a value. Operands of `+` and `*` match in both orders. A
cast in the pattern (`x.float()`, `.to(x.dtype)`) also matches where the value has that type already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch.fx as fx

from irc.core.contract import EXACT, Pass, PassContext, PassResult, Preserves, Skip
from irc.core.errors import PassError
from irc.core.program import VAL, Program, describe
from irc.core.rewrite.builder import build
from irc.core.rewrite.calls import call_name, is_item
from irc.core.rewrite.graph import layout_of, refresh_layouts
from irc.core.rewrite.matcher import Failure, Match, Matcher
from irc.core.rewrite.pattern import CAST, Item, Pattern, trace_pattern

Check = Callable[[Match], "str | None"]
_MAX_CHAIN = 24
ITEM = "getitem"


@dataclass(frozen=True, kw_only=True)
class RewriteRule(Pass):
    """pattern(...)  →  replacement(...), wherever the pattern fits and the check has no objection.

    Attributes:
        name: kebab-case; in reports, and as the stage's name when the rule is used as a pass.
        pattern: function of tensors and constants, or several that spell the same meaning.
        replacement: function of (some of) the same parameters that builds the result.
        check: reads a `Match` and answers with a reason to refuse it, or None. The reason "" refuses
            without reporting: the place is no near miss, only not meant.
        extra_users: allow values inside the pattern to be used outside it (they then stay).
        preserves: what the rewrite promises about the numbers.
    """

    name: str  # type: ignore[misc]  # other passes have one a class, a rule its own
    pattern: Callable[..., Any] | Sequence[Callable[..., Any]]
    replacement: Callable[..., Any]
    check: Check | None = None
    extra_users: bool = False
    preserves: Preserves = field(default=EXACT)

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The traced patterns."""
        given = self.pattern if isinstance(self.pattern, Sequence) else [self.pattern]
        return tuple(trace_pattern(function) for function in given)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = apply_rules(program, [self], ctx)
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def apply_rules(program: Program, rules: Iterable[RewriteRule], ctx: PassContext) -> tuple[int, list[Skip]]:
    """Apply rules until none fits any more; returns how many places were rewritten, and what nearly fitted.

    A place that several rules rewrote one after the other counts once.

    At each node the rules are tried in order. A skip is kept for every node where a check refused, or
    where most of a pattern fitted and something then did not: the best failed match, with its reason.

    Raises:
        PassError: rules keep rewriting one another's results; names the two.
    """
    return _Application(program, list(rules), ctx).run()


class _Application:
    def __init__(self, program: Program, rules: list[RewriteRule], ctx: PassContext) -> None:
        self._program, self._ctx = program, ctx
        self._by_root: dict[str, list[tuple[RewriteRule, Pattern, Matcher]]] = {}
        for rule in rules:
            for pattern in rule.patterns:
                matcher = Matcher(program, pattern, extra_users=rule.extra_users)
                self._by_root.setdefault(_root_name(pattern), []).append((rule, pattern, matcher))
        self._order = {rule.name: position for position, rule in enumerate(rules)}
        self._history: dict[fx.Node, tuple[str, ...]] = {}  # rules that led to a node
        self._skips: dict[fx.Node, tuple[int, Skip]] = {}
        self._built: list[fx.Node] = []
        self._num_removed = 0  # rewrites whose result was there before: x + 0 → x
        self._restrided: set[fx.Node] = set()

    def run(self) -> tuple[int, list[Skip]]:
        changed = True
        while changed:
            changed = False
            self._skips.clear()
            # Last node first, so that the largest of several nested patterns wins.
            for node in reversed(list(self._program.graph.nodes)):
                while not node._erased and node.op == "call_function" and self._rewrite(node):
                    changed = True
        refresh_layouts(self._program, self._restrided)
        num_built = sum(not node._erased for node in self._built)
        return self._num_removed + num_built, [skip for _, skip in self._skips.values()]

    def _rewrite(self, node: fx.Node) -> bool:
        """Apply the first rule that fits at the node; True when the node was replaced."""
        for rule, pattern, matcher in self._candidates(node):
            for match in matcher.match(node):
                reason = rule.check(match) if rule.check is not None else None
                if reason is None:
                    reason = self._apply(rule, match)
                if reason is None:
                    return True
                if reason:
                    self._note(node, len(match.nodes) + pattern.num_operations, Skip.at(node, f"{rule.name}: {reason}"))
            self._note_failure(node, rule, pattern, matcher.best_failure)
        return False

    def _candidates(self, node: fx.Node) -> list[tuple[RewriteRule, Pattern, Matcher]]:
        """Patterns that could have this node as their result, rules in the given order."""
        name = ITEM if is_item(node) else call_name(node) or ""
        found = self._by_root.get(name, [])
        if any_type := [] if name == CAST else self._by_root.get(CAST, []):
            # A pattern that ends in a cast also fits where that cast was not needed.
            found = sorted([*found, *any_type], key=lambda candidate: self._order[candidate[0].name])
        return found

    def _apply(self, rule: RewriteRule, match: Match) -> str | None:
        """Replace the match; a reason (or "" when the context forbids it) if it stays as it is."""
        program, root = self._program, match.root
        history = (*self._history.get(root, ()), rule.name)
        if len(history) > _MAX_CHAIN:
            names = list(dict.fromkeys(reversed(history)))[:2]
            raise PassError(
                f"rewrite rules do not come to an end at {root.name}: {' and '.join(names)} keep rewriting"
                f" each other's result; make one of them refuse what the other one builds"
                if len(names) == 2
                else f"rewrite rule {rule.name} keeps matching its own result at {root.name}: its check must refuse it"
            )
        result, created = build(rule.replacement, program, match.values, root)
        problem = _type_difference(program, root, result)
        if problem is None and not self._ctx.allow(root):
            problem = ""
        if problem is not None:
            _erase_unused(created)
            return problem
        self._history |= dict.fromkeys(created, history)
        if result in created:
            self._built.append(result)
        else:
            self._num_removed += 1
        # Same type, but perhaps another memory layout, which then changes those of the users.
        if layout_of(result) != layout_of(root):
            self._restrided.add(result)
        root.replace_all_uses_with(result)
        _erase_unused([node for node in program.graph.nodes if node in match.nodes])
        for node in match.nodes:
            self._skips.pop(node, None)
        return None

    def _note_failure(self, node: fx.Node, rule: RewriteRule, pattern: Pattern, failure: Failure | None) -> None:
        # Less than half of a pattern is no near miss: every multiplication starts like some rule.
        if failure is not None and failure.progress >= 2 and 2 * failure.progress + 1 >= pattern.num_operations:
            self._note(node, failure.progress, Skip.at(node, f"{rule.name}: at {failure.node.name}: {failure.reason}"))

    def _note(self, node: fx.Node, weight: int, skip: Skip) -> None:
        known = self._skips.get(node)
        if known is None or weight > known[0]:
            self._skips[node] = (weight, skip)


def _root_name(pattern: Pattern) -> str:
    root = pattern.root
    if isinstance(root, Item):
        return ITEM
    return CAST if root.name == CAST else {"aten::square": "aten::pow"}.get(root.name, root.name)


def _type_difference(program: Program, old: fx.Node, new: fx.Node) -> str | None:
    before, after = old.meta[VAL], new.meta[VAL]
    if before.dtype == after.dtype and program.shape_expr(old) == program.shape_expr(new):
        return None
    return f"the replacement gives {describe(after)} where the pattern gave {describe(before)}"


def _erase_unused(nodes: Iterable[fx.Node]) -> None:
    for node in reversed(list(nodes)):
        if not node._erased and not node.users:
            node.graph.erase_node(node)
