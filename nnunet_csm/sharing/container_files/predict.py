"""What the container runs: predictions of the model in this folder, as `interface.json` says."""

import os
import sys
import tempfile
import warnings
from pathlib import Path


def run() -> int:
    folder = Path(__file__).resolve().parent
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    # read when nnU-Net is imported; and libraries keep caches, for which nothing else may be written to
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / "model")
    for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "HOME"):
        os.environ[name] = tempfile.gettempdir()
    # what libraries say of each other
    warnings.simplefilter("ignore", FutureWarning)
    from nnunet_csm.sharing.contained import main

    return main(folder)


if __name__ == "__main__":
    sys.exit(run())
