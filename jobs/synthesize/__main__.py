"""`python -m jobs.synthesize`."""

import sys

from jobs.synthesize.cli import main

if __name__ == "__main__":
    sys.exit(main())
