"""Cross-series masked pretraining without nnU-Net: tensors in, an encoder out. Read from top to bottom in ten minutes.

Subjects of a phantom stand in for MRI: put your own tensor (subjects, series, z, y, x), z-scored, in the place of `volumes`.
Takes about a minute on a CPU:

    python examples/pretrain.py -o encoder.pt
"""

import argparse

import numpy as np
import torch

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.tokens import grid_size, to_tokens
from nnunet_csm.phantom import PhantomSpec, draw_subject
from nnunet_csm.plans import Architecture, Masking, Reconstruction
from nnunet_csm.pretext.csm import CSM, masked_mean
from nnunet_csm.pretext.masking import Mask, ask_some, draw_mask

SERIES = ("FLAIR", "T1w", "T1ce", "T2w")
SPEC = PhantomSpec(SERIES, shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0))
# a patch of 16 x 32 x 32 voxels is 4 x 4 x 4 tokens, for each series
TOKEN_SIZE = (4, 8, 8)
NUM_TRAINING, NUM_HELD_OUT, BATCH_SIZE = 24, 8, 8

# half of the tokens of a series are hidden, each series at its own places, and one or more series whole (paper III-B)
MASKING = Masking(mask_ratio=0.5, places="independent", hidden_series="rebuilt")
ENCODER = Architecture(SERIES, (0, 1, 2, 3), TOKEN_SIZE, width=96, depth=3, num_heads=4, features=8, drop_path=0.0)
# thrown away afterwards; a step rebuilds a quarter of what is hidden
DECODER = Reconstruction(width=96, depth=1, num_heads=4, normalize_targets=False, rebuilt_share=0.25)


def volumes(subjects: range) -> torch.Tensor:
    """Z-scored series of phantoms (subjects, series, z, y, x)."""
    drawn = np.stack([list(draw_subject(SPEC, subject).series.values()) for subject in subjects])
    mean, deviation = drawn.mean((2, 3, 4), keepdims=True), drawn.std((2, 3, 4), keepdims=True)
    return torch.from_numpy((drawn - mean) / deviation).float()


def mask_of(step: int, num_samples: int) -> Mask:
    """What is hidden of a batch: a function of the step, so that a run can be repeated.

    All samples of a batch show the same number of series, so that the encoder gets as many tokens of each. This phantom has all
    series; where a subject lacks one, `present` says so, and it is neither shown nor asked for.
    """
    draws = Draws(step, torch.arange(num_samples))
    present = torch.ones(num_samples, len(SERIES), dtype=torch.bool)
    num_shown = 1 + step % (len(SERIES) - 1)
    num_tokens = int(np.prod(grid_size(SPEC.shape, TOKEN_SIZE)))
    mask = draw_mask(draws, present, num_shown, num_tokens, MASKING)
    return ask_some(mask, draws, DECODER.rebuilt_share)


def held_out_error(model: CSM, images: torch.Tensor) -> tuple[float, float]:
    """Mean squared error on hidden tokens of subjects that are not learned from: the network's, and that of the mean, 0."""
    model.eval()
    mask = mask_of(0, len(images))
    with torch.no_grad():
        found = masked_mean(model(images, mask), mask)
        tokens = to_tokens(images, TOKEN_SIZE).flatten(1, 2)
        asked = tokens.gather(1, mask.asked[..., None].expand(-1, -1, tokens.shape[-1]))
        of_the_mean = masked_mean(asked.square().mean(-1), mask)
    model.train()
    return float(found), float(of_the_mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", default="encoder.pt", help="weights of the encoder (default: encoder.pt)")
    parser.add_argument("-n", type=int, default=600, help="steps (default: 600)")
    args = parser.parse_args()
    torch.manual_seed(0)
    training, held_out = volumes(range(NUM_TRAINING)), volumes(range(NUM_TRAINING, NUM_TRAINING + NUM_HELD_OUT))
    model = CSM(ENCODER, DECODER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    for step in range(args.n):
        batch = training[torch.randperm(NUM_TRAINING)[:BATCH_SIZE]]
        mask = mask_of(step, BATCH_SIZE)
        # encode the visible tokens, rebuild hidden ones, compare: `CSM.forward` reads so as well
        loss = masked_mean(model(batch, mask), mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == args.n - 1:
            found, of_the_mean = held_out_error(model, held_out)
            print(f"step {step:4d}  loss {loss:.3f}  held out {found:.3f} (the mean: {of_the_mean:.3f})", flush=True)
    torch.save(model.encoder.state_dict(), args.o)
    print(f"the encoder is in {args.o}")


if __name__ == "__main__":
    main()
