"""`python -m mmx`: the `mmx` command."""

import sys

from mmx.cli import main

if __name__ == "__main__":
    sys.exit(main())
