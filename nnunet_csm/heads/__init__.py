"""What a classifier is trained for: classes, numbers."""
