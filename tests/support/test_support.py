"""Every row of the table, alone and in combinations: untouched training, a ledger that closes, the judge's parts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.data import DATA
from tests.support.fitting import Combination, Fitted, fitted
from tests.support.table import FEATURES, NETWORKS, OPTIMIZERS


def assert_untouched(found: Fitted) -> None:
    """Bit by bit the same fit, and no hook left behind."""
    pairs = zip(found.plain.state_dict().items(), found.recorded.state_dict().values(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.recorded.modules())


def assert_ledger_closes(found: Fitted) -> None:
    """Its terms add up to the network's output."""
    ledger, output, scale = found.terms
    gap = float((sum(ledger.values()) - output).abs().max() / scale)
    assert gap < (1e-8 if found.combination.feature.double else 1e-4), f"the ledger misses the network by {gap:.2e}"


def assert_contributions(found: Fitted) -> None:
    """Each is the judge's, or all together are; what they lack is what the ledger calls unattributed."""
    contributions, (ids, expected) = found.contributions(), found.judged()
    if not found.combination.exact:
        contributions = contributions.sum(1, keepdim=True)
    else:
        assert found.ids() == ids
    largest, tolerance = expected.abs().max(), found.combination.feature.tolerance
    assert float(largest) > 1e-4, "nothing was learned"
    ledger = found.terms[0]
    if found.combination.optimizer.unattributed:
        lacking = (expected - contributions).sum(1) - ledger["unattributed"]
        assert float(lacking.abs().max() / largest) < tolerance
        return
    gap = (contributions - expected).abs() / largest
    worst = divmod(int(gap.argmax()), len(ids))
    assert float(gap.max()) < tolerance, (
        f"query {worst[0]}, example {ids[worst[1]]}: {contributions[worst]:.6g} for {expected[worst]:.6g}, "
        f"{gap.max():.2g} of the largest"
    )
    total = found.contributions().sum(1) - ledger["examples"]
    assert float(total.abs().max() / largest) < max(1e-8, 1e-2 * tolerance)


def assert_all_of_it(combination: Combination, root: Path) -> Fitted:
    found = fitted(combination, root)
    assert_untouched(found)
    assert_ledger_closes(found)
    assert_contributions(found)
    return found


def assert_unattributed(found: Fitted, share: float) -> None:
    """The share that the table names, to a fifth of it."""
    assert found.machine.fidelity([found.queries])["error_unattributed"] == pytest.approx(share, rel=0.2)


def assert_all_is_attributed(found: Fitted) -> None:
    budget = found.machine.fidelity([found.queries])
    limit = max(1e-7, found.combination.feature.tolerance if not found.combination.feature.double else 0)
    assert budget["error_unattributed"] < limit, budget
    assert budget["error_sketch"] < limit, budget
    assert found.machine.chords[-1].last_step == found.combination.feature.steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers(name: str, tmp_path: Path) -> None:
    found = assert_all_of_it(Combination(OPTIMIZERS[name], FEATURES["plain"], NETWORKS["mlp"]), tmp_path)
    if OPTIMIZERS[name].unattributed:
        assert_unattributed(found, OPTIMIZERS[name].unattributed)
    else:
        assert_all_is_attributed(found)


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw"])
@pytest.mark.parametrize("name", [name for name in FEATURES if name != "plain"])
def test_features(name: str, optimizer: str, tmp_path: Path) -> None:
    feature = FEATURES[name]
    found = assert_all_of_it(Combination(OPTIMIZERS[optimizer], feature, NETWORKS["mlp"]), tmp_path)
    if not feature.unattributed:
        assert_all_is_attributed(found)
    else:
        assert_unattributed(found, feature.unattributed[optimizer])


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mlp"])
def test_networks(name: str, tmp_path: Path) -> None:
    found = assert_all_of_it(Combination(OPTIMIZERS["adamw"], FEATURES["plain"], NETWORKS[name]), tmp_path)
    assert_all_is_attributed(found)


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, tmp_path: Path) -> None:
    row = DATA[name]
    feature = replace(FEATURES["plain"], trainer={"max_steps": row.steps}) if name == "stream" else FEATURES["plain"]
    combination = Combination(OPTIMIZERS["sgd momentum"], feature, NETWORKS["mlp"], row)
    found = assert_all_of_it(combination, tmp_path)
    assert found.machine.chords[-1].last_step == row.steps


def combinations(count: int) -> list[tuple[str, str, str]]:
    """Fixed, drawn from all that go together."""
    alone = ("plain", "schedule by epoch")  # the schedule by step is drawn
    features = [name for name, row in FEATURES.items() if row.network is None and name not in alone]
    networks = [name for name in NETWORKS if name != "mlp"]
    rng = random.Random(0)
    columns = [[rng.sample(names, len(names)) for _ in range(9)] for names in (list(OPTIMIZERS), features, networks)]
    cycled = [[name for part in column for name in part][:count] for column in columns]
    return list(zip(*cycled, strict=True))


@pytest.mark.parametrize(("optimizer", "feature", "network"), combinations(40))
def test_combinations(optimizer: str, feature: str, network: str, tmp_path: Path) -> None:
    assert_all_of_it(Combination(OPTIMIZERS[optimizer], FEATURES[feature], NETWORKS[network]), tmp_path)


SINGLE = [
    ("sgd momentum", "cnn"), ("adamw", "cnn with batch norm"), ("nadam", "weight norm"), ("adadelta", "lstm"),
    ("rmsprop", "perceptron with dropout"), ("adamax", "tied weights"), ("adamw", "language model"),
    ("rprop", "no rule for any layer"),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "network"), SINGLE)
def test_the_ledger_closes_in_single_precision(optimizer: str, network: str, tmp_path: Path) -> None:
    found = fitted(Combination(OPTIMIZERS[optimizer], FEATURES["single precision"], NETWORKS[network]), tmp_path)
    assert_untouched(found)
    assert_ledger_closes(found)
