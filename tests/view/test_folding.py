"""Names and types in lines that a reader can take in."""

from __future__ import annotations

import pytest

from irc.view.folding import fold

WEIGHT = "layers.*.attn.q_proj_k_proj_v_proj.weight_stored u8[768, 128] ×5"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, [WEIGHT]),
        (50, ["layers.*.attn.q_proj_k_proj_v_proj.weight_stored", "u8[768, 128] ×5"]),
        (39, ["layers.*.attn.q_proj_k_proj_v_proj.", "weight_stored u8[768, 128] ×5"]),
        (15, ["layers.*.attn.", "q_proj_k_proj_", "v_proj.", "weight_stored", "u8[768, 128] ×5"]),
    ],
)
def test_a_weight_breaks_before_its_type_behind_dots_and_behind_underscores(width: int, lines: list[str]) -> None:
    assert fold(WEIGHT, width).split("\n") == lines


@pytest.mark.parametrize("width", range(1, 70))
@pytest.mark.parametrize("text", [WEIGHT, "aten.linear ×3, aten.split_with_sizes", "x" * 50, "a, b{c=1,d=2}", ""])
def test_nothing_is_lost_and_nothing_is_too_wide(text: str, width: int) -> None:
    lines = fold(text, width).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(lines) or not text
