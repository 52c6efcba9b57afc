"""How good a result is: segmentations beside references, rebuilt volumes beside true ones. Imports nothing of ours but errors."""
