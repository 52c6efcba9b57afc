"""Preprocessed cases to batches."""
