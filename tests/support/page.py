"""docs/support.md, written from the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.support.data import DATA
from tests.support.processes import DDP
from tests.support.refusals import REFUSED, SPLIT_NETWORKS
from tests.support.rows import RefusedRow
from tests.support.table import FEATURES, NETWORKS, OPTIMIZERS
from tests.test_losses import LOSSES

PATH = Path(__file__).parents[2] / "docs" / "support.md"

_HEAD = """# What is supported

Written by `python -m tests.support` from the table that the test suite runs: change the table, not this page.

**How a row is proved.** A small network is trained twice, with the callback and without; every contribution of every
training example is computed again from the training without it, by gradients of single examples, the optimiser's
formula and an integral along every step. In every row that is not refused the two trainings are the same bit by bit,
and the ledger adds up to the network's output, to 1e-8 in float64 and to 1e-4 in single and mixed precision.

- *exact*: every contribution is the one computed again, to the tolerance that is named, relative to the largest one.
- *total exact*: training mixes rows or draws random numbers, so that an example has no gradient of its own to compare
  with. What all examples contribute together is exact, to the tolerance that is named.
- *unattributed*: a share of what was learned belongs to no example and is in the ledger's `unattributed` term. The
  figure is that share where the row is proved; yours is logged as `pathkernel/error_unattributed`.
- *refused*: by an error that names the cause and the remedy, before the first step, with all weights as they were.

All this is without a sketch and with a node at every step. A sketch (`sketch_dim`) and fewer nodes are approximations
that you choose; what they cost is measured in [benchmarks.md](benchmarks.md) and explained in [limits.md](limits.md).
Optimisers, features of the loop and networks below go together; forty combinations of them are proved as single rows
are.
"""

_OPTIMIZERS = """`Rprop` divides a gradient by its own size. Where it is nothing but rounding (the bias of keys in
attention, a bias before a batch norm) its step is rounding too, and so are the contributions through it; the total is
exact, but under clipping (measured: 3 % off). A subclass of an optimiser is another optimiser and needs a rule of its
own.
"""

_LOSSES = """An example's part is what went back through its own row of the outputs, whatever the loss.
"""


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head = ("what", "status", "tolerance or unattributed share", "remedy or reason")
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _exact(what: str, tolerance: float = 1e-6) -> tuple[str, ...]:
    return what, "exact", f"{tolerance:.0e}".replace("e-0", "e-"), ""


def _unattributed(what: str, share: str, remedy: str) -> tuple[str, ...]:
    return what, "unattributed", share, remedy


def _refused(rows: Mapping[str, RefusedRow]) -> list[tuple[str, ...]]:
    return [(row.what, "refused", "", row.remedy) for row in rows.values()]


def _optimizers() -> list[tuple[str, ...]]:
    out = []
    for row in OPTIMIZERS.values():
        if row.unattributed:
            out.append(_unattributed(row.what, f"{row.unattributed:.2f} of the change", "`RMSprop` without momentum"))
        else:
            out.append(_exact(row.what))
    return out + _refused(REFUSED["optimisers"])


def _features() -> list[tuple[str, ...]]:
    out = []
    for row in FEATURES.values():
        if row.unattributed:
            shares = ", ".join(f"{share:.2f} with {OPTIMIZERS[o].what}" for o, share in row.unattributed.items())
            out.append(_unattributed(row.what, shares, "clip by norm"))
        else:
            out.append(_exact(row.what, row.tolerance))
    return out + _refused(REFUSED["loops"])


def _networks() -> list[tuple[str, ...]]:
    out = []
    for row in NETWORKS.values():
        out.append((row.what, "total exact", "1e-6", row.inexact) if row.inexact else _exact(row.what))
    return out + _refused(REFUSED["networks"])


def _processes() -> list[tuple[str, ...]]:
    split = ", ".join(f"`{name}`" for name in SPLIT_NETWORKS)
    return [
        _exact("one process, on the CPU"),
        _exact(DDP.feature.what),
        *_refused(REFUSED["processes"]),
        (f"networks split among devices ({split})", "refused", "", '`strategy="ddp"`, or one device'),
    ]


def page() -> str:
    """The whole page."""
    sections = {
        "Optimisers": _table(_optimizers()) + "\n" + _OPTIMIZERS,
        "Training loops": _table(_features()),
        "Networks": _table(_networks()),
        "Losses": _table(_exact(name, 1e-4) for name in LOSSES) + "\n" + _LOSSES,
        "Training data": _table([*(_exact(row.what) for row in DATA.values()), *_refused(REFUSED["data"])]),
        "Processes": _table(_processes()),
    }
    return _HEAD + "".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
