"""The page on adding a layer rule, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pathkernel.capture import layer_rules, rules
from lightning_pathkernel.testing import assert_layer_rule

PAGE = Path(__file__).parents[2] / "docs" / "add-a-layer-rule.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page defines, its own proof run; its rule is forgotten afterwards."""
    monkeypatch.setattr(rules, "_RULES", layer_rules())
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_page_proves_its_own_rule(page: dict[str, Any]) -> None:
    assert len(BLOCKS) == 3
    assert layer_rules()[page["Scale"]] is page["scale_rule"]


def test_the_proof_would_see_a_wrong_rule(page: dict[str, Any]) -> None:
    @rules.register_layer_rule(page["Scale"], replace=True)
    def wrong(layer: Any, call: Any) -> Any:
        return {name: type(value)(2 * value.values) for name, value in page["scale_rule"](layer, call).items()}

    with pytest.raises(AssertionError):
        assert_layer_rule(page["Scale"](7), (torch.randn(5, 7),))
