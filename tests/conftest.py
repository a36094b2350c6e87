"""For all tests."""

from __future__ import annotations

import torch

# The networks are tiny and the suite runs on several processes: threads would only wait for one another.
torch.set_num_threads(1)
