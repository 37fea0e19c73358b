"""A peer's row: whatever it raises leaves it out."""

from __future__ import annotations

import importlib
from typing import Any

from senri.benchmark.plan import Spec
from senri.benchmark.process import LeftOut
from senri.benchmark.rows import quiet


def peer(spec: Spec) -> dict[str, Any]:
    """See :mod:`senri.benchmark.peers`.

    Raises:
        LeftOut: it is not there, or cannot run.
    """
    quiet()
    try:
        module = importlib.import_module(f"senri.benchmark.peers.{spec['peer']}")
        row = module.measure(spec["tokens"], spec["decode"], spec["repeats"], **spec["options"])
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        raise LeftOut(" ".join(str(error).split()) or type(error).__name__) from None
    return {**row, "peer": spec["peer"], "decode": spec["decode"]}
