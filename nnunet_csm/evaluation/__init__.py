"""How good a result is: segmentations beside references, rebuilt voxels beside true ones and a linear map."""
