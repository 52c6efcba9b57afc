"""Networks; they know nothing of trainers or files."""
