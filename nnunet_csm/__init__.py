"""Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels (arXiv 2412.07387)."""

__version__ = "0.1.0"
