"""``python -m senri.benchmark.measure '{"measurement": ..., ...}'``: measures one row and prints it as a line of JSON.

Nothing heavy is imported before the row is known: the row ``load`` measures that too.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from senri.benchmark.plan import Spec
from senri.benchmark.process import LeftOut, process_peak

HOMES = {
    "bounds": "rows",
    "reading": "rows",
    "states": "rows",
    "decoding": "rows",
    "memory": "memory_rows",
    "training": "training_rows",
    "features": "training_rows",
    "conversion": "load_rows",
    "load": "load_rows",
    "peer": "peer_rows",
}


def measure(spec: Spec) -> dict[str, Any]:
    """The row of a spec from :func:`senri.benchmark.plan.plan`, in this process.

    Raises:
        LeftOut: it cannot be had here.
    """
    name = spec["measurement"]
    row = getattr(importlib.import_module(f"senri.benchmark.{HOMES[name]}"), name)(spec)
    return {"key": spec["key"], "measurement": name, **row, "process_peak_bytes": process_peak()}


def main() -> None:
    """The command line of one row."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        row = measure(json.loads(sys.argv[1]))
    except (LeftOut, ImportError) as reason:  # an extra that is not installed
        row = {"left_out": str(reason)}
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)
    print(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main()
