"""`python -m avmae_fast.cli`, as torchrun starts it, is `avmae`."""

import sys

from avmae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
