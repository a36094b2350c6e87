"""Every pair of a text's and a ground's colour, in both themes, from the style itself."""

from __future__ import annotations

import itertools
import re

import pytest

from lightning_pathkernel.report.page import template_text

STYLE = template_text("report.css")
Colour = tuple[float, float, float]
TEXTS_ON = {
    "ink": ("page", "panel"),
    "muted": ("page", "panel"),
    "accent": ("page", "panel"),
    "for": ("panel",),
    "against": ("panel",),
    "on-accent": ("accent",),
}


def colours(theme: int) -> dict[str, Colour]:
    """The theme's variables: 0 is light, 1 is dark."""
    found = re.findall(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", STYLE)
    return {name: rgb(pair[theme]) for name, *pair in found}


def rgb(text: str) -> Colour:
    r, g, b = (int(text[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return r, g, b


def luminance(colour: Colour) -> float:
    """Relative luminance of WCAG 2."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: Colour, b: Colour) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    r, g, b_ = (share * x + (1 - share) * y for x, y in zip(a, b, strict=True))
    return r, g, b_


def test_the_measure_is_that_of_wcag() -> None:
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast(rgb("#777777"), rgb("#ffffff")) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(theme: int) -> None:
    found = colours(theme)
    assert set(TEXTS_ON) <= set(found)
    for text, grounds in TEXTS_ON.items():
        for ground in grounds:
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_numbers_stand_out_from_every_shade_of_the_heat_map(theme: int) -> None:
    found = colours(theme)
    most = re.search(r"--heat: (\d+)%", STYLE)
    assert most
    for name, share in itertools.product(("for", "against"), (0.25, 0.5, 1)):
        ground = mixed(found[name], found["panel"], share * int(most[1]) / 100)
        assert contrast(found["ink"], ground) >= 4.5, (name, share)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_bars_stand_out_and_for_differs_from_against_for_every_kind_of_sight(theme: int) -> None:
    """Colour-blind or not: by Machado's matrices for protan, deutan and tritan sight, in linear light."""
    found = colours(theme)
    for name in ("for", "against", "ink", "accent"):
        assert contrast(found[name], found["panel"]) >= 3
    matrices = (
        ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
        ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    )
    for matrix in matrices:
        pair = [[sum(m * c**2.2 for m, c in zip(row, found[name], strict=True)) for row in matrix]
                for name in ("for", "against")]  # fmt: skip
        seen = [[max(0.0, c) ** (1 / 2.2) for c in colour] for colour in pair]
        apart = sum((a - b) ** 2 for a, b in zip(*seen, strict=True)) ** 0.5
        assert apart > 0.25, (matrix, apart)


def test_no_colour_is_set_past_the_variables() -> None:
    """Else the tests above would not see it: only print's white and grey, and a mask, are written out."""
    body = re.sub(r"--[a-z-]+: light-dark\([^)]*\);", "", STYLE)
    assert sorted(set(re.findall(r"#[0-9a-fA-F]{3,8}\b", body))) == ["#000", "#d5d5d0", "#fff"]
    assert not re.search(r"\b(rgb|hsl|oklch)a?\(", body)
