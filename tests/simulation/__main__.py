"""Simulate many seeds: `python -I tests/simulation --seeds 10000`.

Python puts this folder on its path when it is run as a whole, also with -I.
"""

from __future__ import annotations

import sys

from simulated.runner import main

if __name__ == "__main__":
    sys.exit(main())
