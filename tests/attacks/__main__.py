"""Law: the command of the random edits (``attacks.edits``)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from attacks.edits import main

parser = argparse.ArgumentParser(description="Random edits of stores and archives, followed by every command.")
parser.add_argument("--edits", type=int, default=1000)
parser.add_argument("--seed", type=int, default=1)
given = parser.parse_args()
sys.exit(1 if main(given.edits, given.seed) else 0)
