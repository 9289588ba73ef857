"""``python -m hf_packfix``."""

import sys

from hf_packfix.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
