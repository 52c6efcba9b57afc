"""The nnU-Net trainers of this package."""
