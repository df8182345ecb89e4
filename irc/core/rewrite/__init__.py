"""Rewrite rules: plain Python functions on tensors, traced, matched against a program and applied."""

from irc.core.rewrite.matcher import Match
from irc.core.rewrite.rule import RewriteRule, apply_rules

__all__ = ["Match", "RewriteRule", "apply_rules"]
