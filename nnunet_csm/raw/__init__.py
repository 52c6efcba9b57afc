"""Raw images as nnU-Net stores them: the names of the series, and whether every file is there and fits."""
