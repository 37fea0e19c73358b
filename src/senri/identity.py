"""What a run was made with, as JSON values: a folder is gone on with by the same settings only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Identity = dict[str, Any]  # all that decides the results


def run_name(identity: Identity) -> str:
    """A folder name that is the same for the same settings, model and texts, and for no others."""
    text = json.dumps(identity, sort_keys=True)
    return f"{Path(str(identity['model'])).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The dotted names of the values in which two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [name]
