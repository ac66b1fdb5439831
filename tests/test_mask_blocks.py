"""The drop-in's large boolean masks as block masks: when, and that nobody can tell but by the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashx import BlockMask
from flashx.nn import mask_blocks
from flashx.nn.functional import scaled_dot_product_attention
from flashx.nn.mask_blocks import block_mask_of

N = 1024


def documents(*lead: int) -> torch.Tensor:
    """Causal within documents of 200 tokens."""
    document = torch.arange(N) // 200
    return ((document[:, None] == document) & torch.ones(N, N, dtype=torch.bool).tril()).expand(*lead, N, N)


def inputs(heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, N, 16, requires_grad=True) for _ in range(3)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """The block masks made, in order."""
    masks: list[BlockMask] = []
    original = BlockMask.from_dense

    def record(*arguments: Any) -> BlockMask:
        masks.append(original(*arguments))
        return masks[-1]

    monkeypatch.setattr(BlockMask, "from_dense", record)
    return masks


def test_results_and_gradients_are_torchs(made: list[BlockMask]) -> None:
    mask = documents().contiguous()
    mask[7] = False
    results = {}
    for function in (scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
        query, key, value = inputs()
        out = function(query, key, value, mask)
        results[function] = (out, *torch.autograd.grad(out.square().sum(), (query, key, value)))
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(made) == 1 and made[0].equal(BlockMask.from_dense(mask))


def test_a_mask_is_looked_at_once_and_again_when_it_was_written_to(made: list[BlockMask]) -> None:
    mask = documents().contiguous()
    query, key, value = inputs()
    first = scaled_dot_product_attention(query, key, value, mask)
    scaled_dot_product_attention(query, key, value, mask)
    assert len(made) == 1
    mask[:, :64] = True
    second = scaled_dot_product_attention(query, key, value, mask)
    assert len(made) == 2 and not torch.equal(first, second)
    torch.testing.assert_close(second, torch._C._nn.scaled_dot_product_attention(query, key, value, mask))


def test_masks_are_forgotten_with_their_tensors() -> None:
    before = len(mask_blocks._known)
    mask = documents().contiguous()
    assert block_mask_of(mask, 1, 4, N, N) is not None and len(mask_blocks._known) == before + 1
    del mask
    assert len(mask_blocks._known) == before


@pytest.mark.parametrize(
    "mask, heads",
    [
        (documents().float(), 4),  # numbers are added
        (documents()[:512], 4),  # small
        (documents(1, 4).contiguous(), 4),  # nobody shares it
        (documents(), 3),
        (torch.ones(1, N, dtype=torch.bool), 8),  # one row for all
        (torch.ones(N, N, dtype=torch.bool).tril(900), 8),  # hides too little
        (torch.rand(N, N) < 0.5, 8),  # hides no block
    ],
    ids=["float", "small", "each head its own", "few heads", "one row", "nearly full", "noise"],
)
def test_masks_that_stay_what_they_are(mask: torch.Tensor, heads: int) -> None:
    assert block_mask_of(mask, 1, heads, mask.shape[0] if mask.dim() == 2 else N, N) is None


def test_masks_for_each_entry_of_the_batch_are_shared_by_heads() -> None:
    mask = documents(2, 1).contiguous()
    blocks = block_mask_of(mask, 2, 4, N, N)
    assert blocks is not None and blocks.shape == (2, 1, N, N)


def test_inference_tensors_and_compiled_calls() -> None:
    with torch.inference_mode():
        mask = documents().contiguous()
        query, key, value = inputs()
        out = scaled_dot_product_attention(query, key, value, mask)
        torch.testing.assert_close(out, torch._C._nn.scaled_dot_product_attention(query, key, value, mask))
    compiled = torch.compile(scaled_dot_product_attention, backend="eager", fullgraph=True)
    mask = documents().contiguous()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(query, key, value, mask), scaled_dot_product_attention(query, key, value, mask)
        )
