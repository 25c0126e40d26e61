"""The tables of docs/models.md, out of the raw results.

python -m benchmarks.coverage.report              # print them
python -m benchmarks.coverage.report --write      # into docs/models.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.coverage.results import RESULTS, read
from benchmarks.coverage.tables import failures, models_table, reasons_table, shortfalls, totals
from benchmarks.coverage.zoo.registry import ENTRIES
from benchmarks.document import show_parts

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_PARTS = {"totals": totals, "below": shortfalls, "models": models_table, "reasons": reasons_table, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/models.md")
    args = parser.parse_args()
    found = read(args.results)
    results = [found[name] for name in ENTRIES if name in found]
    show_parts(DOCUMENT, _PARTS, results, "benchmarks/coverage/report.py", args.write)


if __name__ == "__main__":
    main()
