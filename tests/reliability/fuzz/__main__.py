"""The target under atheris: ``python -m tests.reliability.fuzz -runs=1000000`` and other options of libFuzzer.

The first byte of an input chooses the door. Inputs that escape are written as libFuzzer does it, to ``crash-*``.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lightning_pathkernel"]):
    from tests.reliability.fuzz.doors import DOORS, Target
    from tests.reliability.fuzz.mutations import mutated
    from tests.reliability.fuzz.seeds import seeds


def fuzz(root: Path) -> None:
    """Fuzz until libFuzzer ends the process.

    Args:
        root: An empty directory in memory.
    """
    sound, node = seeds(root / "seeds")
    corpus = root / "corpus"
    corpus.mkdir()
    for number, door in enumerate(DOORS):
        for index, data in enumerate(sound[door]):
            (corpus / f"{door.replace(' ', '-')}-{index}").write_bytes(bytes([number]) + data)
    (root / "place").mkdir()
    target = Target(root / "place", node)

    def one_input(data: bytes) -> None:
        if data:
            target(DOORS[data[0] % len(DOORS)], data[1:])

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if len(data) < 2 or rng.random() < 0.2:
            return atheris.Mutate(data, max_size)
        return (data[:1] + mutated(data[1:], rng))[:max_size]

    limits = ["-max_len=20480", "-timeout=10", "-rss_limit_mb=800"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Fuzz in a child, and clear up after it.

    Returns:
        Its exit status: 0 if nothing escaped.
    """
    warnings.simplefilter("ignore")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as root:
        child = os.fork()
        if child == 0:
            try:
                fuzz(Path(root))
            finally:
                os._exit(1)  # libFuzzer ends the process by itself, unless something failed before
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
