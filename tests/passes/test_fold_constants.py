from __future__ import annotations

import pytest
import torch
from torch import Tensor

from irc.core.contract import registered_passes
from irc.core.errors import OptionError
from irc.core.pipeline import parse_pipeline, print_pipeline
from irc.passes import FoldConstants
from tests.passes.raising import captured, raised
from tests.passes.running import operations, reasons, run_pass

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
W = torch.linspace(0.5, 2.0, 6)


def test_weight_arithmetic_becomes_a_weight() -> None:
    result = raised(FoldConstants(), captured(lambda x, w: x * (1.0 + w).exp(), (X,), W), widths=[(6,)])
    assert operations(result.program) == {"mul": 1}
    assert (result.matches, result.program.weight_bytes) == (1, W.nbytes)
    (weight,) = result.program.weights.values()
    torch.testing.assert_close(weight, (1 + W).exp())


def test_equal_results_share_one_weight() -> None:
    result = run_pass(FoldConstants(), captured(lambda x, w: x * (1 + w) + (1 + w), (X,), W))
    assert (result.matches, len(result.program.weights)) == (2, 1)


def test_size_dependent_tables_and_free_views_are_kept() -> None:
    def table(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.arange(x.shape[1])[:, None].cos() + w.view(1, 1, 6)

    before = captured(table, (X,), W)
    result = run_pass(FoldConstants(), before)
    assert (result.matches, operations(result.program)) == (0, operations(before))


def test_growth_is_bounded() -> None:
    before = captured(lambda x, w: x @ torch.outer(w, w), (X,), W)
    result = run_pass(FoldConstants(max_bytes=100), before)
    assert result.matches == 0
    assert reasons(result) == "folding adds 120 bytes of weights, more than max_bytes=100"  # 144 new, 24 freed
    assert run_pass(FoldConstants(max_bytes=120), before).matches == 1


def test_dequantized_weights_stay_quantized() -> None:
    def model(x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        return x @ (torch.ops.irc.dequantize(stored, scale, None, format="int8.row") * 2)

    stored = torch.randint(-127, 127, (6, 6), dtype=torch.int8)
    before = captured(model, (X,), stored, torch.rand(6, 1))
    assert run_pass(FoldConstants(), before).matches == 0


def test_options_round_trip_and_are_checked() -> None:
    passes = [FoldConstants(max_bytes=100)]
    assert parse_pipeline(print_pipeline(passes)) == passes
    assert registered_passes()["fold-constants"] is FoldConstants
    with pytest.raises(OptionError, match="max_bytes is -1, must be 0 or more"):
        FoldConstants(max_bytes=-1)
