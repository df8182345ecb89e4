"""Attention: by the definition, in blocks, over pages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irc.core.ops.attention as attention_module
from irc.core.ops import all_ops
from tests.core.op_examples import close, heads, integers, rand


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, positions: Tensor | None = None,
    sinks: Tensor | None = None, mask: str = "full", window: int = 0, scale: float = 1.0, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """One query at a time, straight from the definition."""
    (batch, num_heads, num_queries, _), num_keys = query.shape, key.shape[2]
    out = query.new_zeros(batch, num_heads, num_queries, value.shape[-1])
    for b, h, s in itertools.product(range(batch), range(num_heads), range(num_queries)):
        p = num_keys - num_queries + s if positions is None else int(positions[b, s])
        kv = h * key.shape[1] // num_heads
        logits, values = [], []
        for t in range(num_keys):
            seen = {"full": True, "causal": t <= p, "sliding": p - window < t <= p}
            if not seen.get(mask, t <= p and window and t // window == p // window):
                continue
            score = scale * query[b, h, s] @ key[b, kv, t]
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            if bias is not None:
                entry = bias.expand(batch, num_heads, num_queries, num_keys)[b, h, s, t]
                if entry.dtype == torch.bool and not entry:
                    continue
                score = score if entry.dtype == torch.bool else score + entry
            logits.append(score)
            values.append(value[b, kv, t])
        if sinks is not None:
            logits.append(sinks[h])
            values.append(torch.zeros_like(value[b, kv, 0]))
        if logits and max(logits) > -torch.inf:
            out[b, h, s] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


MASKS: dict[str, dict[str, Any]] = {
    "full": {"mask": "full"},
    "causal": {"mask": "causal"},
    "sliding": {"mask": "sliding", "window": 3},
    "chunked": {"mask": "chunked", "window": 4},
}


def _bias(kind: str, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "row of -inf":  # the first query sees nothing
        return torch.zeros(1, 1, queries, keys, dtype=torch.float64).index_fill(2, torch.tensor([0]), -torch.inf)
    shape = {"all": (2, 4, queries, keys), "heads": (1, 4, queries, keys), "keys": (2, 1, 1, keys),
             "queries": (1, 4, queries, 1)}[kind.split(", ")[-1]]  # fmt: skip
    values = rand(*shape, dtype=torch.float64)
    return values > -0.5 if kind.startswith("bool") else values


BIASES = ["none", "row of -inf", "float, all", "float, heads", "float, keys", "float, queries",
          "bool, all", "bool, heads", "bool, keys", "bool, queries"]  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and keys at sizes that a test can afford."""
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 4)
    monkeypatch.setattr(attention_module, "_KEY_BLOCK", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
def test_flash_attention_equals_attention(mask: str, bias: str) -> None:
    keys, width = 11, 4
    for queries, kv, sinks, softcap, placed in itertools.product(
        (6, 11), (4, 2), (False, True), (None, 1.5), (False, True)
    ):
        query = rand(2, 4, queries, width, dtype=torch.float64)
        key, value = (rand(2, kv, keys, w, dtype=torch.float64) for w in (width, 6))
        options = {
            **MASKS[mask], "bias": _bias(bias, queries, keys), "softcap": softcap, "scale": 0.7,
            "sinks": rand(4, dtype=torch.float64) if sinks else None,
            "positions": integers(keys, 2, queries) if placed else None,
        }  # fmt: skip
        expected = torch.ops.irc.attention(query, key, value, **options)
        made = torch.ops.irc.flash_attention(query, key, value, **options)
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)
        assert expected.isfinite().all()


@pytest.mark.parametrize("bias", ["none", "row of -inf", "float, keys", "bool, all"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_formula(mask: str, bias: str) -> None:
    query, key = rand(2, 4, 3, 4, dtype=torch.float64), rand(2, 2, 5, 4, dtype=torch.float64)
    value = rand(2, 2, 5, 6, dtype=torch.float64)
    for sinks, softcap, placed in [(False, None, False), (True, 1.5, True)]:
        options = {
            **MASKS[mask], "bias": _bias(bias, 3, 5), "softcap": softcap, "scale": 0.7,
            "sinks": rand(4, dtype=torch.float64) if sinks else None,
            "positions": integers(5, 2, 3) if placed else None,
        }  # fmt: skip
        made = torch.ops.irc.attention(query, key, value, **options)
        torch.testing.assert_close(made, naive_attention(query, key, value, **options), rtol=1e-10, atol=1e-10)


def test_attention_is_sdpa() -> None:
    query, key, value = rand(2, 4, 5, 8), rand(2, 4, 5, 8), rand(2, 4, 5, 8)
    for causal in (False, True):
        mask, scale = "causal" if causal else "full", 8**-0.5
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        for op in (torch.ops.irc.attention, torch.ops.irc.flash_attention):
            close(op(query, key, value, mask=mask, scale=scale), expected)


@pytest.mark.parametrize("op", ["attention", "flash_attention"])
def test_bad_masks_are_refused(op: str) -> None:
    function = all_ops()[op].overload
    with pytest.raises(ValueError, match="mask='sliding' needs a window"):
        function(*heads(), mask="sliding")
    with pytest.raises(ValueError, match="unknown mask 'prefix'; known: full, causal"):
        function(*heads(), mask="prefix", window=3)


# -------------------------------------------------------------------- pages


def _slots(tables: Tensor, sequences: Tensor, positions: Tensor, page: int) -> Tensor:
    return tables[sequences, positions // page] * page + positions % page


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("options", [
    {"mask": "full"}, {"mask": "causal"}, {"mask": "sliding", "window": 5}, {"mask": "chunked", "window": 4},
    {"mask": "causal", "softcap": 1.5, "scale": 0.4},
])  # fmt: skip
def test_paged_attention_equals_contiguous(options: dict[str, Any], kv: int) -> None:
    """Two sequences written in interleaved pieces with padding between: as if each had a cache of its own."""
    page, length, tables = 4, 12, torch.tensor([[6, 1, 2], [0, 7, 4]])
    sinks = rand(4) if "softcap" in options else None
    pages = [torch.zeros(8, page, kv, width) for width in (4, 6)]
    caches = [torch.zeros(2, kv, length, width) for width in (4, 6)]
    pieces = [([0, 1, 0, 1], [0, 0, 1, 1]), ([1, 1, 0], [2, 3, 2]), ([1, 0, 1], [4, 3, 5])]
    if options["mask"] == "full":  # sees keys behind the sequence, too: fill them
        pieces = [([0] * length + [1] * length, [*range(length)] * 2)]
    for sequence_list, position_list in pieces:
        sequences, positions = torch.tensor(sequence_list), torch.tensor(position_list)
        count = len(sequences)
        slots = _slots(tables, sequences, positions, page)
        for i, width in enumerate((4, 6)):
            new = rand(count, kv, width) + position_list[0]
            padded = torch.cat((new, new[:2])), torch.cat((slots, torch.tensor([-1, -1])))
            pages[i] = torch.ops.irc.paged_cache_write(pages[i], *padded)
            for n in range(count):
                at = positions[n].view(1, 1).expand(2, 1)
                written = torch.ops.irc.cache_write(caches[i], new[n].expand(2, kv, width).unsqueeze(2), at)
                caches[i][sequences[n]] = written[sequences[n]]
        query = rand(count, 4, 4)
        made = torch.ops.irc.paged_attention(query, *pages, tables, sequences, positions, sinks=sinks, **options)
        for n in range(count):
            own = [cache[sequences[n] : sequences[n] + 1] for cache in caches]
            expected = torch.ops.irc.attention(
                query[n].view(1, 4, 1, 4), *own, positions=positions[n].view(1, 1), sinks=sinks, **options
            )
            close(made[n], expected[0, :, 0])


def test_padding_never_undoes_a_write() -> None:
    """Padding in front of, between and behind a token of slot 0."""
    cache, value = rand(2, 4, 2, 6), rand(5, 2, 6)
    made = torch.ops.irc.paged_cache_write(cache, value, torch.tensor([-1, 0, -1, 6, -1]))
    expected = cache.clone()
    expected[0, 0], expected[1, 2] = value[1], value[3]
    assert torch.equal(made, expected)
    assert torch.equal(torch.ops.irc.paged_cache_write(cache, value, torch.full((5,), -1)), cache)
