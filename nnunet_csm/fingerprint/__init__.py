"""What a dataset is made of, seen before planning: which series each case has, how they look, where they lie."""
