"""`python -m nnunet_csm` is `nnunet_csm`."""

import sys

from nnunet_csm.cli import main

if __name__ == "__main__":
    sys.exit(main())
