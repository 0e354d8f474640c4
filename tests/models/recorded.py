"""The results of the parity tests that `jaxlm families` and README.md show."""

import json
import os
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "parity.json"


def record(case: str, family: str, **found) -> None:
    """Keeps what a case gave, under JAXLM_WRITE_RESULTS=1 (in one process: pytest -n 0)."""
    if os.environ.get("JAXLM_WRITE_RESULTS") == "1":
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[case] = results.get(case, {}) | {"family": family} | found
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
