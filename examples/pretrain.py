"""Cross-series masked pretraining without nnU-Net: tensors in, an encoder out. Read from top to bottom in ten minutes.

Subjects of a phantom stand in for MRI: put your own tensor (subjects, series, z, y, x), z-scored, in the place of `volumes`.
Takes about a minute on a CPU:

    python examples/pretrain.py -o encoder.pt
"""

import argparse
import math

import numpy as np
import torch

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import coordinates, grid_size, select, to_tokens
from nnunet_csm.model.vit import ViT
from nnunet_csm.phantom import PhantomSpec, draw_subject
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.masking import Mask, Masking, ask_some, draw_mask
from nnunet_csm.pretext.rebuilding import masked_mean

SERIES = ("FLAIR", "T1w", "T1ce", "T2w")
SPEC = PhantomSpec(SERIES, shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0))
# a patch of 16 x 32 x 32 voxels is 4 x 4 x 4 tokens, for each series
ENCODER = Architecture(SERIES, (0, 1, 2, 3), (4, 8, 8), width=96, depth=3, num_heads=4, features=8, drop_path=0.0)
GRID = grid_size(SPEC.shape, ENCODER.token_size)
# half of the tokens of a series are hidden, each series at its own places, and one or more series whole (paper III-B)
MASKING = Masking(mask_ratio=0.5, places="independent", hidden_series="rebuilt")
NUM_TRAINING, NUM_HELD_OUT, BATCH_SIZE = 24, 8, 8


def volumes(subjects: range) -> torch.Tensor:
    """Z-scored series of phantoms (subjects, series, z, y, x)."""
    drawn = np.stack([list(draw_subject(SPEC, subject).series.values()) for subject in subjects])
    mean, deviation = drawn.mean((2, 3, 4), keepdims=True), drawn.std((2, 3, 4), keepdims=True)
    return torch.from_numpy((drawn - mean) / deviation).float()


def mask_of(step: int, num_samples: int, rebuilt_share: float) -> Mask:
    """What is hidden of a batch, and which share of it is rebuilt: a function of the step, so that a run can be repeated.

    All samples of a batch show the same number of series, so that the encoder gets as many tokens of each. This phantom has all
    series; where a subject lacks one, `present` says so, and it is neither shown nor asked for.
    """
    draws, num_shown = Draws(step, torch.arange(num_samples)), 1 + step % (len(SERIES) - 1)
    present = torch.ones(num_samples, len(SERIES), dtype=torch.bool)
    return ask_some(draw_mask(draws, present, num_shown, math.prod(GRID), MASKING), draws, rebuilt_share)


def loss_of(encoder: ViT, decoder: ReconstructionDecoder, images: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Encode the visible tokens, rebuild hidden ones, compare: mean squared error (paper Eq. 1 and 2)."""
    tokens = to_tokens(images, ENCODER.token_size)
    encoded = encoder(select(tokens, mask.visible), coordinates(mask.visible, GRID))[-1]
    rebuilt = decoder(encoded, mask.visible, mask.asked, GRID)
    return masked_mean((rebuilt - select(tokens, mask.asked)).square().mean(-1), mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", default="encoder.pt", help="weights of the encoder (default: encoder.pt)")
    parser.add_argument("-n", type=int, default=600, help="steps (default: 600)")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, held_out = volumes(range(NUM_TRAINING)), volumes(range(NUM_TRAINING, NUM_TRAINING + NUM_HELD_OUT))
    encoder = ViT(ENCODER)
    # thrown away afterwards
    decoder = ReconstructionDecoder(
        len(SERIES), math.prod(ENCODER.token_size), encoder_width=ENCODER.width, width=96, depth=1, num_heads=4
    )
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    for step in range(args.n):
        batch = training[torch.randperm(NUM_TRAINING)[:BATCH_SIZE]]
        # a quarter of what is hidden is rebuilt in a step
        loss = loss_of(encoder, decoder, batch, mask_of(step, BATCH_SIZE, 0.25))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == args.n - 1:
            with torch.no_grad():
                found = loss_of(encoder, decoder, held_out, mask_of(0, NUM_HELD_OUT, 1.0))
            print(f"step {step:4d}  loss {loss:.3f}  held out {found:.3f} (the mean of a series: about 1)", flush=True)
    torch.save(encoder.state_dict(), args.o)
    print(f"the encoder is in {args.o}")


if __name__ == "__main__":
    main()
