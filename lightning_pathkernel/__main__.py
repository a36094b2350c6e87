"""`python -m lightning_pathkernel`."""

import sys

from lightning_pathkernel.cli import main

if __name__ == "__main__":
    sys.exit(main())
