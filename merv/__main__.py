"""`python -m merv` is `merv`, as torchrun and the like want it."""

import sys

from merv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
