"""python -m tests.mutants [PATTERN]: examine all mutants, or those whose id has PATTERN in it, and print the table.

Exits with 1 if one was not caught.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .bench import Bench
from .mutant import examine
from .table import MUTANTS, lines


def main() -> int:
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory(prefix="siglance-mutants-") as folder:
        bench = Bench(Path(folder))
        found = [(mutant, examine(bench, mutant)) for mutant in MUTANTS if pattern in mutant.id]
    print("\n".join(lines(found)))
    return not all(finding.caught for _, finding in found)


if __name__ == "__main__":
    sys.exit(main())
