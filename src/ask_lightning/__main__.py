"""`python -m ask_lightning` is the command `ask-lightning`."""

import sys

from ask_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
