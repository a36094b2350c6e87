"""The page on adding a rule, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pathkernel.optim import UnsupportedOptimizerError, optimizer_rule, rules
from lightning_pathkernel.testing import assert_optimizer_rule

PAGE = Path(__file__).parents[2] / "docs" / "add-an-optimizer-rule.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page defines; its rule is forgotten afterwards."""
    monkeypatch.setattr(rules, "_RULES", rules.optimizer_rules())
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_page_proves_its_own_rule(page: dict[str, Any]) -> None:
    assert len(BLOCKS) == 3
    assert isinstance(optimizer_rule(page["Lion"]([torch.zeros(1)])), page["LionRule"])


def test_the_pages_optimiser_is_lion(page: dict[str, Any]) -> None:
    """Algorithm 2 of the paper, written out with numbers."""
    w = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    optimizer = page["Lion"]([w], lr=0.1, betas=(0.5, 0.75), weight_decay=0.2)
    for gradient in ([4.0, -4.0, 0.0], [-1.0, 0.5, 0.0]):
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    # buffers before the second step: 1, -1, 0; mixtures 0, -0.25, 0
    expected = torch.tensor([0.98 * 0.88, 0.98 * 1.08 + 0.1, 0.98 * 0.98], dtype=torch.float64)
    torch.testing.assert_close(w, expected)


def test_a_beta_of_nothing_is_refused(page: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOptimizerError, match="use betas above 0"):
        optimizer_rule(page["Lion"]([torch.zeros(1)], betas=(0.9, 0.0)))


def test_the_registry_is_as_it_was() -> None:
    assert "Lion" not in {kind.__name__ for kind in rules.optimizer_rules()}


WRONG = {
    "a wrong preconditioner": ("m.abs()", "2 * m.abs()", "displacement"),
    "a wrong buffer": ("inject=1 - beta2", "inject=1 - beta1", "displacement|momentum buffer"),
    "a learning rate that does not follow": ('rate = float(group["lr"])', "rate = 0.01", "step 4, displacement"),
    "no decay": ('rate * float(group["weight_decay"])', "0.0", "displacement"),
    "an undefined D": (".masked_fill_(m == 0, torch.inf)", "", r"step 0, displacement\[6\]: found nan"),
    "a mask that leaves weights out": (
        'state["exp_avg"] != 0',
        'state["exp_avg"] > 0',
        "that the mask of moved weights",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_proof_finds(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, match = WRONG[what]
    monkeypatch.setattr(rules, "_RULES", rules.optimizer_rules())
    names: dict[str, Any] = {}
    for block in BLOCKS[:2]:
        exec(block.replace(right, wrong), names)
    with pytest.raises(AssertionError, match=match):
        assert_optimizer_rule(lambda p: names["Lion"](p, lr=0.01, weight_decay=0.1))
