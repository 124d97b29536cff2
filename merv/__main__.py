"""`python -m merv` does the same as `merv`. torchrun and similar tools need this form."""

import sys

from merv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
