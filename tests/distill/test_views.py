import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ced.config import SpecTransforms, TimeMaskingArgs, WavTransforms
from ced.distill.views import (
    NO_VIEW,
    View,
    ViewRecipe,
    blanked,
    check_masks,
    draw,
    mask,
    mask_uniforms,
    recipe_of,
    shift_into,
)
from ced.errors import ConfigError

RECIPE = ViewRecipe()


@pytest.mark.parametrize(
    ("seed", "samples", "view"),
    [
        (0, 160_000, View(72_326, 0.08847743272781372, 0.13203048706054688)),
        (0, 31_000, View(-3_395, 0.08847743272781372, 0.13203048706054688)),
        (1, 160_000, View(0, 0.2793108820915222, 0.40306925773620605)),  # not applied: the uniforms are drawn next
        (42, 160_000, View(0, 0.9150039553642273, 0.38286375999450684)),
        (1_965_479_068, 32_000, View(486, 0.6652854681015015, 0.5838112235069275)),
        (2**31 - 1, 160_000, View(0, 0.3542391061782837, 0.10543233156204224)),
    ],
)
def test_draws_are_golden(seed: int, samples: int, view: View) -> None:
    assert draw(RECIPE, seed, samples) == view


@pytest.mark.parametrize("samples", [160_000, 80_001, 31_000, 3])
def test_draws_equal_those_of_the_global_generator(samples: int) -> None:
    shifted = 0
    for seed in [0, 7, 2**31 - 1, *range(1_000, 1_050)]:
        torch.manual_seed(seed)
        shift = torch.zeros(1, dtype=torch.int32)
        if torch.distributions.Bernoulli(torch.tensor(0.5)).sample((1,)):
            low, high = round(-0.5 * samples), round(0.5 * samples)
            shift = torch.randint(low=low, high=high + 1, size=(1,), dtype=torch.int32)
            shifted += 1
        u1, u2 = torch.rand(1), torch.rand(1)
        assert draw(RECIPE, seed, samples) == View(int(shift), float(u1), float(u2))
    assert 15 < shifted < 40


def test_drawing_does_not_use_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(RECIPE, 0, 160_000)
    assert torch.equal(torch.rand(3), expected)


def test_the_state_of_the_given_generator_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(99)
    torch.rand(17, generator=generator)
    assert draw(RECIPE, 3, 160_000, generator) == draw(RECIPE, 3, 160_000)


def test_without_a_shift_the_uniforms_are_drawn_first() -> None:
    torch.manual_seed(0)
    u1, u2 = float(torch.rand(1)), float(torch.rand(1))
    assert draw(ViewRecipe(shift=None), 0, 160_000) == View(0, u1, u2)
    assert draw(NO_VIEW, 0, 160_000) == View(0, u1, u2)


def test_shifts_stay_within_the_recipe() -> None:
    shifts = {draw(ViewRecipe(shift=(-0.25, 0.5)), seed, 8).shift for seed in range(400)}
    assert shifts == {-2, -1, 0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("shift", "rolled"),
    [
        (0, [1, 2, 3, 4, 5]),
        (2, [4, 5, 1, 2, 3]),
        (-1, [2, 3, 4, 5, 1]),
        (5, [1, 2, 3, 4, 5]),
        (-5, [1, 2, 3, 4, 5]),
    ],
)
def test_a_shift_rolls_the_wave(shift: int, rolled: list[int]) -> None:
    wave = np.array([1, 2, 3, 4, 5], np.int16)
    assert rolled == torch.roll(torch.from_numpy(wave), shift).tolist()
    out = np.full(7, 9, np.int16)
    shift_into(out, wave, shift)
    assert out.tolist() == [*rolled, 9, 9]


def test_an_empty_wave_can_be_shifted() -> None:
    out = np.ones(2, np.int16)
    shift_into(out, np.empty(0, np.int16), 3)
    assert out.tolist() == [1, 1]


def masked(size: tuple[int, int], uniforms: Sequence[tuple[float, float]], recipe: ViewRecipe) -> list[str]:
    """Return which values are blanked: a row of "." and "0" for each mel bin, with the clips side by side."""
    mel = torch.ones(len(uniforms), *size)
    after = mask(mel, mask_uniforms([View(0, *pair) for pair in uniforms]), recipe)
    assert mel.eq(1).all()
    rows = after.int().permute(1, 0, 2).tolist()  # (f, b, n)
    return [" ".join("".join(".0"[place == 0] for place in clip) for clip in row) for row in rows]


def test_masks_are_golden() -> None:
    # Time: w = 0.5 * 6 = 3, start = floor(0.5 * (8 - 3)) = 2. Frequency: w = 0.5 * 4 = 2, start = floor(0.5 * 3) = 1.
    # Second clip: w = 5.4, start = floor(0.9 * 2.6) = 2, 5 frames; w = 3.6, start = floor(0.9 * 1.4) = 1, 3 bins.
    assert masked((5, 8), [(0.5, 0.5), (0.9, 0.9)], ViewRecipe(time_mask=6, freq_mask=4)) == [
        "..000... ..00000.",
        "00000000 00000000",
        "00000000 00000000",
        "..000... 00000000",
        "..000... ..00000.",
    ]


def test_masks_are_optional() -> None:
    uniforms = [(0.5, 0.5)]
    assert masked((2, 8), uniforms, ViewRecipe(time_mask=6, freq_mask=None)) == ["..000...", "..000..."]
    assert masked((2, 8), uniforms, ViewRecipe(time_mask=None, freq_mask=2)) == ["00000000", "........"]
    assert masked((2, 8), uniforms, NO_VIEW) == ["........", "........"]


@pytest.mark.parametrize(
    ("pair", "row"),
    [
        ((0.0, 0.9), "......"),  # no width
        ((0.08, 0.9), "......"),  # less than a frame
        ((0.25, 0.0), "000..."),
        ((0.25, 0.99), "..000."),  # start = floor(2.97): the last frame is never masked
        ((0.5, 0.7), "000000"),  # as wide as the axis
        ((0.75, 0.9), "000000"),  # wider: start = floor(0.9 * (6 - 9)) = -3, end = 6
    ],
)
def test_masks_at_the_edges(pair: tuple[float, float], row: str) -> None:
    # P = 12 on 6 frames, so w = 12 u1.
    assert masked((1, 6), [pair], ViewRecipe(time_mask=12, freq_mask=None)) == [row]


def test_mask_positions_are_computed_in_float32() -> None:
    for seed in range(200):
        view = draw(RECIPE, seed, 160_000)
        width = np.float32(view.u1) * np.float32(192)
        start = math.floor(np.float32(view.u2) * (np.float32(1_001) - width))
        after = mask(torch.ones(1, 64, 1_001), mask_uniforms([view]), ViewRecipe(freq_mask=None))
        blank = (after[0, 0] == 0).nonzero().flatten().tolist()
        assert blank == list(range(start, start + math.floor(width)))


def test_a_mask_does_not_depend_on_other_clips_of_the_batch() -> None:
    mel = torch.randn(5, 64, 201, generator=torch.Generator().manual_seed(0))
    uniforms = mask_uniforms([draw(RECIPE, seed, 32_000) for seed in range(5)])
    together = mask(mel, uniforms, RECIPE)
    alone = [mask(mel[i : i + 1], uniforms[i : i + 1], RECIPE) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_uniforms_of_an_empty_batch() -> None:
    assert mask_uniforms([]).shape == (0, 2)


@pytest.mark.parametrize(("seconds", "share"), [(0.5, 0.73), (1.0, 0.47), (1.5, 0.21), (1.91, 0.0), (10.0, 0.0)])
def test_the_share_of_blanked_views_equals_that_of_many_draws(seconds: float, share: float) -> None:
    samples, recipe = round(seconds * 16_000), ViewRecipe()
    assert blanked(recipe, samples) == pytest.approx(share, abs=0.005)
    views = [draw(recipe, seed, samples) for seed in range(600)]
    mel = torch.ones(600, 64, 1 + samples // 160)
    masked = mask(mel, mask_uniforms(views), ViewRecipe(freq_mask=None))
    found = float((masked == 0).flatten(1).all(1).float().mean())
    assert found == pytest.approx(share, abs=0.05)


def test_a_recipe_without_masks_blanks_nothing() -> None:
    assert blanked(ViewRecipe(time_mask=None, freq_mask=None), 16_000) == 0


def test_the_default_mask_width_depends_on_the_chunk_length() -> None:
    def width(seconds: float, given: int | None = None) -> int | None:
        masks = SpecTransforms(TimeMasking=TimeMaskingArgs(time_mask_param=given))
        return recipe_of(WavTransforms(), masks, round(seconds * 16_000)).time_mask

    assert [width(seconds) for seconds in (0.15, 0.5, 0.6, 1, 2, 5, 10, 30)] == [3, 9, 11, 19, 38, 96, 192, 192]
    assert width(0.5, given=192) == 192


def test_masks_that_blank_chunks_are_refused_or_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    check_masks(ViewRecipe(time_mask=51), 8_000)
    assert not caplog.records
    check_masks(ViewRecipe(time_mask=55), 8_000)
    assert "time_mask_param is 55 and a chunk of 0.5 s has 51 frames: the mask blanks 7% of the views" in caplog.text
    with pytest.raises(ConfigError, match=r"time_mask_param is 192 .* 73% .* at most 51 .* 9 is"):
        check_masks(ViewRecipe(), 8_000)
