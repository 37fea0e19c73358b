"""Lagged Cache Training against sequential training: ``python scripts/lagged_cache.py``.

No options: everything stands in config/experiment.yaml under `lagged_cache` (and `transformer_lm`).
"""

from senri.cli.lagged_cache import main

if __name__ == "__main__":
    main()
