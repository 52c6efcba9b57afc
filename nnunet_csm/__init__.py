"""Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels (arXiv 2412.07387)."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_encoder` and `load_network`, imported when they are asked for: the package itself must not wait for torch."""
    if name == "load_encoder":
        from nnunet_csm.model.frozen import load_encoder

        return load_encoder
    if name == "load_network":
        from nnunet_csm.sharing.network import load_network

        return load_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
