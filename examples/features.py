"""What a pretrained encoder makes of a study: features for anything that is not nnU-Net, from any subset of its series.

    python examples/features.py checkpoint_final.pth FLAIR=flair.nii.gz T1w=t1.nii.gz -o features.pt

The images lie on one grid. They are resampled to the spacing that the encoder was trained at, and z-scored over their nonzero
voxels, much as nnU-Net's preprocessing does for brains without skulls; a series that a patient does not have is left out.
"""

import argparse

import numpy as np
import SimpleITK as sitk
import torch

import nnunet_csm


def read(path: str, spacing: tuple[float, float, float]) -> np.ndarray:
    """An image (z, y, x) at a spacing in mm along (z, y, x)."""
    image = sitk.ReadImage(path, sitk.sitkFloat32)
    size = [round(n * old / new) for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing[::-1], strict=True)]
    frame = image.GetOrigin(), spacing[::-1], image.GetDirection()
    resampled = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, *frame, 0.0, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(resampled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of pretraining or fine-tuning, or a folder of export_weights")
    parser.add_argument("images", nargs="+", metavar="SERIES=FILE", help="one or more series of one patient")
    parser.add_argument("-o", default="features.pt", help="default: features.pt")
    args = parser.parse_args()
    encoder = nnunet_csm.load_encoder(args.checkpoint)
    print(f"the encoder knows {', '.join(encoder.series)}, at {encoder.spacing} mm, in tokens of {encoder.token_size} voxels")
    files = dict(image.split("=", 1) for image in args.images)
    features = encoder.features({series: read(path, encoder.spacing) for series, path in files.items()})
    # of each series at each place (series, l, e); their mean as a map (e, gz, gy, gx); one vector for the patient (e,)
    print(f"tokens {tuple(features.tokens.shape)}, map {tuple(features.map.shape)}, vector {tuple(features.vector.shape)}")
    torch.save({"tokens": features.tokens, "map": features.map, "vector": features.vector}, args.o)
    print(f"they are in {args.o}")


if __name__ == "__main__":
    main()
