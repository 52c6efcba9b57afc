"""What to build for a dataset: the planner and its presets."""
