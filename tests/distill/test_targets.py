import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ced.config import Fill
from ced.distill.targets import mixup, mixup_weights, spread

# Exact in float16, so that expected values can be written out.
VALUES = torch.tensor([[0.75, 0.5], [0.25, 0.125]], dtype=torch.float16)
INDEXES = torch.tensor([[3, 0], [1, 4]], dtype=torch.int16)


@pytest.mark.parametrize(
    ("fill", "first", "second"),
    [
        ("zero", 0.0, 0.0),
        ("last_mean", 0.5 / 3, 0.125 / 3),
        ("last_half", 0.25, 0.0625),
        ("527", 0.2, 0.2),
    ],
)
def test_spread_fills_the_classes_outside_the_top_k(fill: Fill, first: float, second: float) -> None:
    expected = torch.tensor([[0.5, first, first, 0.75, first], [second, 0.25, second, second, 0.125]])
    spread_out = spread(VALUES, INDEXES, 5, fill)
    assert spread_out.dtype == torch.float32
    torch.testing.assert_close(spread_out, expected, rtol=0, atol=1e-8)


def test_spread_draws_each_class_below_the_last_value() -> None:
    filled = spread(VALUES, INDEXES, 5, "last_random", torch.Generator().manual_seed(0))
    expected = torch.rand((2, 5), generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.5], [0.125]])
    expected[0, 3], expected[0, 0], expected[1, 1], expected[1, 4] = 0.75, 0.5, 0.25, 0.125
    assert torch.equal(filled, expected)


def test_spread_rows_do_not_share_memory() -> None:
    """The fill of a row must not be one expanded value in memory."""
    filled = spread(VALUES, INDEXES, 5, "last_half")
    filled[0, 1] = 9
    assert filled.tolist() == [[0.5, 9.0, 0.25, 0.75, 0.25], [0.0625, 0.25, 0.0625, 0.0625, 0.125]]


def test_spread_of_all_classes_fills_nothing() -> None:
    values = torch.tensor([[0.5, 0.25]])
    for fill in ("zero", "last_mean", "last_half", "last_random", "527"):
        assert torch.equal(spread(values, torch.tensor([[1, 0]]), 2, fill), torch.tensor([[0.25, 0.5]]))


def test_mixup_partner_is_the_reversed_batch() -> None:
    mel = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])
    mixed = mixup(mel, torch.tensor([0.75, 0.5, 0.0]))
    assert mixed.tolist() == [[[2.0, 3.0]], [[3.0, 4.0]], [[1.0, 2.0]]]


def test_mixup_weights_are_beta_distributed_and_repeatable() -> None:
    weights = mixup_weights(4000, 0.5, np.random.default_rng(0))
    assert weights.dtype == torch.float32
    assert 0 <= float(weights.min()) <= float(weights.max()) <= 1
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(weights.var()) == pytest.approx(1 / 8, abs=0.01)  # of Beta(1/2, 1/2)
    assert torch.equal(weights, mixup_weights(4000, 0.5, np.random.default_rng(0)))


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.cross_entropy])
def test_the_loss_of_mixed_targets_is_the_mixed_loss(loss: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, drawn = torch.randn((2, 4, 6), generator=generator)
    targets, weights = drawn.softmax(1), torch.rand(4, generator=generator)

    def each(partner: Tensor) -> Tensor:
        value: Tensor = loss(logits, partner, reduction="none")
        return value.flatten(1).mean(1) if value.ndim > 1 else value

    mixed_loss = (weights * each(targets) + (1 - weights) * each(targets.flip(0))).mean()
    torch.testing.assert_close(loss(logits, mixup(targets, weights)), mixed_loss)
