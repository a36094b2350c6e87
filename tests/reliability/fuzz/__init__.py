"""Random bytes at every door through which files of others come in: only `ArtifactError` may come out.

`plain` needs nothing but Python; ``python -m tests.reliability.fuzz`` is the same target under atheris, which coverage
leads.
"""

from tests.reliability.fuzz.doors import DOORS, Target
from tests.reliability.fuzz.mutations import mutated
from tests.reliability.fuzz.plain import FuzzReport, plain
from tests.reliability.fuzz.seeds import seeds

__all__ = ["DOORS", "FuzzReport", "Target", "mutated", "plain", "seeds"]
