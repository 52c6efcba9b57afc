"""Weights that load elsewhere: written for others, and brought in from others."""
