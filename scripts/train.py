"""``senri train`` as a script, for several processes: ``accelerate launch scripts/train.py`` or ``torchrun ...``."""

import sys

from senri.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
