"""What the page is made of: pictures, numbers, axes."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_pathkernel.ledger import LEDGER_TERMS
from lightning_pathkernel.report.charts import nice_ticks
from lightning_pathkernel.report.history import thinned
from lightning_pathkernel.report.items import IMAGE_SIDE, TEXT_LENGTH, as_pixels, show_item
from lightning_pathkernel.report.numbers import decimals_for, percent, plain, signed
from lightning_pathkernel.report.png import data_uri
from lightning_pathkernel.report.waterfall import waterfall


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_is_read_back_as_it_was(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    scheme, _, data = data_uri(pixels).partition(",")
    assert scheme == "data:image/png;base64"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)


def test_ranges_of_images() -> None:
    ramp = torch.linspace(0, 1, 64).reshape(8, 8)
    as_is = as_pixels(ramp)
    assert as_is is not None
    assert (as_is.min(), as_is.max()) == (0, 255)
    half = as_pixels(ramp / 2)
    assert half is not None
    assert half.max() == 128  # within [0, 1] nothing is stretched
    for other in (ramp * 16, ramp * 255, ramp * 4 - 2, (ramp * 255).to(torch.uint8)):
        found = as_pixels(other)
        assert found is not None
        assert np.abs(found.astype(int) - as_is).max() <= 1
    broken = ramp.clone()
    broken[0, 0] = math.nan
    found = as_pixels(broken)
    assert found is not None
    assert found[0, 0, 0] == found.min()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 6), (8, 6, 1)), ((1, 8, 6), (8, 6, 1)), ((3, 8, 6), (8, 6, 3)), ((8, 6, 3), (8, 6, 3)),
        ((4, 8, 6), (8, 6, 4)), ((7, 8, 6), (8, 6, 1)), ((3, 300, 200), (96, 64, 3)), ((600, 300, 3), (96, 48, 3)),
        ((5,), None), ((1, 5), None), ((2, 3, 4, 5), None), ((3, 0, 4), None),
    ],
)  # fmt: skip
def test_shapes_of_images(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    found = as_pixels(torch.rand(shape))
    assert (None if found is None else found.shape) == expected
    assert found is None or max(found.shape[:2]) <= IMAGE_SIDE


def test_long_texts_and_rows_are_cut_and_say_so() -> None:
    text = show_item("x" * 1000)
    assert len(text.text) == TEXT_LENGTH + 1
    assert text.left_out == 600
    row = show_item(torch.arange(30.0), [f"c{i}" for i in range(30)])
    assert (len(row.cells), row.left_out) == (12, 18)
    with pytest.raises(ValueError, match="columns has 2 names, but the row has 3 values"):
        show_item(torch.rand(3), ["a", "b"])


def test_a_pil_image_is_an_image() -> None:
    assert show_item(Image.new("L", (8, 9))).kind == "image"
    assert show_item(7).text == "7"


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (1.23456, 3, "+1.235"), (-1.5, 1, "\u22121.5"), (0.0001, 2, "0.00"), (-0.0001, 2, "0.00"),
        (None, 2, "not finite"), (math.nan, 2, "not finite"), (math.inf, 2, "not finite"), (1.2e9, 2, "+1.200e+09"),
    ],
)  # fmt: skip
def test_signed(value: float | None, decimals: int, expected: str) -> None:
    assert signed(value, decimals) == expected


def test_numbers_have_the_decimals_that_their_scale_deserves() -> None:
    assert [decimals_for([v]) for v in (0.0, 6500.0, 8.3, 0.012, math.nan)] == [3, 0, 3, 5, 3]
    assert [percent(v) for v in (0.0315, 0.00412, 0.0, 1.5, None)] == [
        "3.1\u00a0%", "0.41\u00a0%", "0\u00a0%", "150\u00a0%", "not finite"
    ]  # fmt: skip
    assert plain(-0.0) == "0.000"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_within_their_axis(low: float, width: float) -> None:
    high = low + width
    found = nice_ticks(low, high)
    if high > low * (1 + 1e-9) and width > 1e-9 * abs(low):
        assert 1 <= len(found) <= 7
        assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)


def test_steps_are_whole_numbers() -> None:
    assert nice_ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert nice_ticks(0, 10, whole=True) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0, 2, whole=True) == [0, 1, 2]
    assert nice_ticks(0, 184, whole=True) == [0, 50, 100, 150]


def test_thinning_keeps_both_ends() -> None:
    entries: list[dict[str, Any]] = [{"step": float(k)} for k in range(1000)]
    found = [entry["step"] for entry in thinned(entries, 7)]
    assert (found[0], found[-1], len(set(found))) == (0, 999, 7)
    assert thinned(entries[:5], 7) == entries[:5]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_ledger_that_is_not_finite_is_written_as_such(broken: float) -> None:
    steps, zero = waterfall({**dict.fromkeys(LEDGER_TERMS, 1.0), "sketch": broken}, 2.0, -1.0)
    assert zero == 0
    assert [step.text for step in steps if step.key in ("machine", "sketch", "network")] == [
        "4.000", "not finite", "not finite"
    ]  # fmt: skip
    assert all(step.left == step.width == step.end == 0 for step in steps)


@given(st.lists(st.floats(-100, 100), min_size=7, max_size=7), st.floats(0, 1e5))
def test_every_bar_of_a_waterfall_lies_on_its_track(values: list[float], positive: float) -> None:
    ledger = dict(zip(LEDGER_TERMS, values, strict=True))
    steps, zero = waterfall(ledger, positive, ledger["examples"] - positive)
    assert -1e-6 <= zero <= 100 + 1e-6
    for step in steps:
        assert -1e-6 <= step.left <= step.left + step.width <= 100 + 1e-6
    assert steps[-1].value == pytest.approx(sum(values), abs=1e-6)
    assert {step.key for step in steps if step.cut} <= {"for", "against"}
    spread = max(abs(v) for v in values)
    assert any(step.cut for step in steps) or positive < 100 * max(spread, 1e-9)
