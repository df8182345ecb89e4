"""A small program with everything the text form must carry."""

from __future__ import annotations

import functools

import torch

from irc.core.program import Program
from irc.core.text import parse

TEXT = """irc 1

program @small(%ids: i64[B, S], %cache: f32[B, 2, 8, 4]) -> (f32[B, S, 8], f32[B, 2, 8, 4]) {
  dim B = 3 in 1..
  dim S = 4 in 1..8
  inputs ((*,), {"cache": *})
  outputs (*, {"cache": *})
  alias output 1 = input 1
  metadata {"note": "caf\\u00e9"}
  param @embed.weight: f32[16, 8] = meta
  buffer @table: f32[8] = meta
  tied @head.weight = @embed.weight

  %embedding: f32[B, S, 8] = aten.embedding(@embed.weight, %ids)        # embed model.py:3
  %rms_norm: f32[B, S, 8] = irc.rms_norm(%embedding, @table, 1e-05)     # norm model.py:4
  %view: f32[B*S, 8] = aten.view(%rms_norm, [B*S, 8])                   # - model.py:5
  %split: (f32[B*S, 4], f32[B*S, 4]) = aten.split.Tensor(%view, 4, -1)  # - model.py:6
  %getitem: f32[B*S, 4] = %split[0]                                     # - model.py:6
  %getitem_1: f32[B*S, 4] = %split[1]                                   # - model.py:6
  %cat: f32[B*S, 8] = aten.cat([%getitem_1, %getitem], 1)               # - model.py:7
  %full: f32[S, 1] = aten.full([S, 1], -inf, dtype=f32, device="cpu")   # - model.py:8
  %reshape: f32[B, S, 8] = aten.reshape(%cat, [B, -1, 8])               # - model.py:9
  %add: f32[B, S, 8] = aten.add.Tensor(%reshape, %full, alpha=2)        # - model.py:9
  %mul: f32[B, 2, 8, 4] = aten.mul.Tensor(%cache, 0.5)                  # cache model.py:10
  return %add, %mul
}
"""


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.nn.Parameter(torch.randn(16, 8, generator=generator)),
        "table": torch.randn(8, generator=generator),
    }


def small() -> Program:
    """The program of `TEXT` with weights."""
    program = parse(TEXT, weights=_weights())
    program.example_inputs = (torch.arange(12).view(3, 4), torch.ones(3, 2, 8, 4))
    return program
