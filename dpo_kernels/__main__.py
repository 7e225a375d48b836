"""`python -m dpo_kernels`: the command `dpo-kernels`."""

import sys

from dpo_kernels.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
