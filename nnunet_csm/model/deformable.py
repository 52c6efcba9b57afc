"""Deformable aggregation and refinement of uncertain voxels after Zhang et al. (TMI 2023, 10.1109/TMI.2023.3275592).

Re-implementation from the abstract, no official code: there is one module that aligns and aggregates features of modalities, and
one that refines uncertain voxels from neighbours that are not. Everything else here is ours.
"""

import itertools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.model.fusion import Fusion
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.tokens import Size, to_map

# of the highest entropy, and of the voxels of a patch
UNCERTAIN_ENTROPY, UNCERTAIN_SHARE = 0.5, 0.1
# of the segmentation before the refinement, in the loss
COARSE_WEIGHT = 0.5
NUM_INPAINTINGS = 3


class DeformableFusion(Fusion):
    """The first present series, the reference, and a weighted mean of all, each moved by up to a token to lie on it.

    Offsets start at zero, which leaves every series where it is; the reference's stay there. The weights of a place sum to 1 over
    the present series.
    """

    weighs = True

    def __init__(self, num_series: int, width: int, num_classes: int | None = None, smoothness: float = 0.0) -> None:
        super().__init__(num_series, width)
        self.smoothness = smoothness
        # three numbers a place do not need the encoder's width, and kernels of 3 at that width would outweigh the encoder
        hidden = max(8, width // 8)
        last = nn.Conv3d(hidden, 3, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.offset = nn.Sequential(
            nn.Conv3d(2 * width, hidden, 3, padding=1), nn.InstanceNorm3d(hidden, affine=True), nn.LeakyReLU(), last
        )
        self.weigh = nn.Conv3d(2 * width, 1, 1)

    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e gz gy gx"] | Outputs:
        num_samples, num_series = present.shape
        maps = to_map(features.flatten(0, 1), grid)
        # of equal numbers, argmax takes the first
        first = present.int().argmax(1)
        reference = to_map(features[torch.arange(num_samples, device=first.device), first], grid)
        beside = reference.repeat_interleave(num_series, dim=0)
        offsets = self.offset(torch.cat([beside, maps], dim=1)).tanh().unflatten(0, (num_samples, num_series))
        offsets = offsets * (torch.arange(num_series, device=first.device) != first[:, None])[..., None, None, None, None]
        aligned = sampled(maps, offsets.flatten(0, 1))
        weight = self.weights(beside, aligned, present)
        fused = reference + (weight.to(aligned.dtype) * aligned.unflatten(0, present.shape)).sum(1)
        if self.smoothness == 0 or not self.training:
            return fused
        return Outputs(fused, penalty=self.smoothness * roughness(offsets, present))

    def weights(
        self, reference: Float[Tensor, "n e gz gy gx"], aligned: Float[Tensor, "n e gz gy gx"], present: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b m 1 gz gy gx"]:
        """What each series counts at every place; 0 where it is absent."""
        scores = self.weigh(torch.cat([reference, aligned], dim=1)).unflatten(0, present.shape)
        return scores.float().masked_fill(~present[:, :, None, None, None, None], -math.inf).softmax(1)


def sampled(maps: Float[Tensor, "n e gz gy gx"], offsets: Float[Tensor, "n 3 gz gy gx"]) -> Float[Tensor, "n e gz gy gx"]:
    """Trilinear values beside every place, by at most one place along each axis; beyond the border, the border's.

    Written as a sum over neighbours, not as torch's `grid_sample`, whose places go through rounded coordinates: an offset of zero
    is the identity to the bit, and its gradient is not zero.
    """
    padded = F.pad(maps, (1, 1, 1, 1, 1, 1), mode="replicate")
    # the whole and the fraction: an offset of zero has a gradient, by the next place, so that offsets that begin there learn
    whole = offsets.detach().floor()
    fraction = offsets - whole
    shares = [(whole == step) * (1 - fraction) + (whole == step - 1) * fraction for step in (-1, 0, 1)]
    gz, gy, gx = maps.shape[2:]
    result = torch.zeros_like(maps)
    for z, y, x in itertools.product(range(3), repeat=3):
        share = shares[z][:, :1] * shares[y][:, 1:2] * shares[x][:, 2:]
        result = result + share * padded[:, :, z : z + gz, y : y + gy, x : x + gx]
    return result


def roughness(offsets: Float[Tensor, "b m 3 gz gy gx"], present: Bool[Tensor, "b m"]) -> Float[Tensor, ""]:
    """Squared changes of the offset from a token to the next ones, mean over the tokens of present series."""
    changes = torch.stack([offsets.diff(dim=axis).square().flatten(2).sum(2) for axis in (3, 4, 5)])
    return (changes * present).sum() / (present.sum() * offsets[0, 0, 0].numel())


class RefinedHead(nn.Module):
    """Last layer that segments twice: features of voxels that are uncertain at first are inpainted from those that are not.

    Certain features spread by one voxel in each of three partial convolutions; what they do not reach keeps its own.
    Works for classes that exclude each other, whose probabilities are a softmax.
    """

    def __init__(self, channels: int, num_classes: int, kernel_size: Size, refinement: str) -> None:
        super().__init__()
        self.refinement = refinement
        self.coarse = nn.Conv3d(channels, num_classes, 1)
        self.inpaintings = nn.ModuleList(PartialConv(channels, kernel_size) for _ in range(NUM_INPAINTINGS))
        self.fine = nn.Conv3d(2 * channels, num_classes, 1)

    def forward(self, features: Float[Tensor, "b e z y x"]) -> Float[Tensor, "b c z y x"] | Outputs:
        coarse = self.coarse(features)
        uncertain = self.uncertain(coarse)
        fine = self.fine(torch.cat([self.inpainted(features, uncertain), features], dim=1))
        return Outputs(fine, ((coarse, COARSE_WEIGHT),)) if self.training else fine

    @torch.no_grad()
    def uncertain(self, logits: Float[Tensor, "b c z y x"]) -> Bool[Tensor, "b 1 z y x"]:
        """Voxels whose classes have a high entropy."""
        log = logits.float().log_softmax(1)
        entropy = -(log.exp() * log).sum(1, keepdim=True) / math.log(logits.shape[1])
        if self.refinement == "threshold":
            return entropy > UNCERTAIN_ENTROPY
        num_certain = math.ceil((1 - UNCERTAIN_SHARE) * entropy[0].numel())
        return entropy > entropy.flatten(1).kthvalue(num_certain).values[:, None, None, None, None]

    def inpainted(self, features: Float[Tensor, "b e z y x"], uncertain: Bool[Tensor, "b 1 z y x"]) -> Float[Tensor, "b e z y x"]:
        """Features, those of uncertain voxels from their surroundings."""
        filled, known = features, ~uncertain
        for inpainting in self.inpaintings:
            filled, known = inpainting(filled, known)
        return torch.where(uncertain & known, filled, features)


class PartialConv(nn.Module):
    """Convolution over known voxels (Liu et al., ECCV 2018), as if there were as many as the kernel has, and leaky ReLU."""

    def __init__(self, channels: int, kernel_size: Size) -> None:
        super().__init__()
        z, y, x = self.kernel_size = kernel_size
        self.padding = z // 2, y // 2, x // 2
        self.conv = nn.Conv3d(channels, channels, kernel_size, padding=self.padding, bias=False)

    def forward(
        self, features: Float[Tensor, "b e z y x"], known: Bool[Tensor, "b 1 z y x"]
    ) -> tuple[Float[Tensor, "b e z y x"], Bool[Tensor, "b 1 z y x"]]:
        """Features of voxels with a known one under the kernel, zero elsewhere; and which these are."""
        num_known = F.conv3d(known.to(features.dtype), features.new_ones(1, 1, *self.kernel_size), padding=self.padding)
        scale = math.prod(self.kernel_size) / num_known.clamp(min=1)
        return F.leaky_relu(self.conv(features * known) * scale), num_known > 0
