"""`python -m sr_kernels`: the command line."""

import sys

from sr_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
