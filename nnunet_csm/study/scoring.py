"""How well a pretraining rebuilds patches of test cases: the last step of a run in a study of reconstructions.

nnunet_csm.study.scoring:main CHECKPOINT FOLDER DEVICE
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.bank import Bank, open_bank
from nnunet_csm.data.crops import draw_crops
from nnunet_csm.data.draws import Draws, Purpose, What, key
from nnunet_csm.data.intensities import foreground, percentile_range, scaled
from nnunet_csm.data.sources import case_file
from nnunet_csm.errors import exit_on_user_error
from nnunet_csm.evaluation.reconstruction import error_steps, mean_where, psnr, similarity
from nnunet_csm.files import whole, write_text
from nnunet_csm.plans import Architecture, parse_configuration
from nnunet_csm.pretext.base import NOTHING_HIDDEN, Batch, Pretext, setup_of
from nnunet_csm.pretext.batches import pick

SCORES, SLICES = "scores.csv", "slices.pt"
# what is scored of a patch
HIDDEN_VOXELS, WHOLE_PATCH = "hidden voxels", "whole patch"
# of each case; and cases of whose first patch the middle slices are kept
NUM_PATCHES, NUM_DRAWN = 4, 2


def main() -> None:
    """Read the command line; write SCORES and SLICES into FOLDER."""
    file, folder, device = sys.argv[1:]
    with exit_on_user_error():
        pretext, bank = opened(Path(file))
        score(pretext.to(device).eval(), bank, Path(folder), torch.device(device))


def opened(file: Path) -> tuple[Pretext, Bank]:
    """The pretext in a checkpoint, and the test cases of its fold, of which it has learned nothing."""
    saved = checkpoint.load(file)
    plans, fold = saved["init_args"]["plans"], saved["init_args"]["fold"]
    settings = parse_configuration(plans["configurations"][saved["init_args"]["configuration"]], plans["plans_name"])
    cls, setup = setup_of(settings, plans["plans_name"])
    pretext = cls(setup)
    pretext.load_state_dict(saved["network_weights"])
    (source,), preprocessed = settings.csm.sources, nnunet.folder("nnUNet_preprocessed")
    cases = nnunet.read_splits(preprocessed / source.dataset / settings.csm.splits)[int(fold)]["test"]
    files = [case_file(source, case, setup.architecture.series, preprocessed) for case in sorted(cases)]
    return pretext, open_bank(files, torch.device("cpu"))


def score(pretext: Pretext, bank: Bank, folder: Path, device: torch.device) -> None:
    """Score `NUM_PATCHES` of every case, in full precision, and keep some slices for pictures."""
    rows: list[dict[str, Any]] = []
    slices: dict[str, dict[str, Any]] = {}
    for number, batch in enumerate(tqdm(patches(bank, pretext), "patches", len(bank) * NUM_PATCHES, disable=None)):
        case, patch = bank.names[number // NUM_PATCHES].split("/")[-1], number % NUM_PATCHES
        seen = Patch.of(batch.volumes[0], pretext.rebuilt(batch.to(device)), pretext.setup.architecture)
        rows += [{"case": case, "patch": patch, **row} for row in seen.scores()]
        if patch == 0 and len(slices) < NUM_DRAWN:
            slices[case] = seen.slices()
    write_text(folder / SCORES, pd.DataFrame(rows).to_csv(index=False))
    with whole(folder / SLICES) as temporary:
        torch.save(slices, temporary)


def patches(bank: Bank, pretext: Pretext) -> Iterator[Batch]:
    """Patches of every case, one after the other, the same for all pretexts of one patch size, with what each draws for it.

    They lie where pretraining might cut them, not in the background, and are not flipped. What is drawn of a kind (how many
    series are hidden whole) comes as often as in pretraining.
    """
    weights, (size,) = pretext.variants(bank.series_present), pretext.crop_sizes
    for number in range(len(weights)):
        seed, case = key(0, Purpose.PROBE, number), torch.full((NUM_PATCHES,), number)
        crops = draw_crops(Draws(seed, torch.arange(NUM_PATCHES)), bank.shapes[case], size, bank.occupancy[case])
        volumes = bank.cut(case, replace(crops, flip=torch.zeros_like(crops.flip)), size)
        for patch in range(NUM_PATCHES):
            draws, volume = Draws(seed, torch.tensor([patch])), (volumes[patch : patch + 1],)
            kind = int(pick(weights[number].cumsum(0), draws, What.NUM_SHOWN))
            yield Batch(volume, pretext.draw(draws, bank.series_present[number : number + 1], kind, volume, training=False))


@dataclass(frozen=True)
class Patch:
    """A patch and what was made of it, by what was given (`Pretext.rebuilt`); intensities are from 0 to 1."""

    architecture: Architecture
    true: Float[np.ndarray, "s z y x"]
    inside: Bool[np.ndarray, "s z y x"]
    """Foreground."""
    rebuilt: dict[str, tuple[Float[np.ndarray, "s z y x"], Bool[np.ndarray, "s z y x"]]]
    """Images, and which voxels are not as they were given."""

    @staticmethod
    def of(
        volume: Float[Tensor, "1 s z y x"], rebuilt: Mapping[str, tuple[Tensor, Tensor]], architecture: Architecture
    ) -> "Patch":
        """Scale everything as the true voxels of each series want it."""
        bounds = percentile_range(volume, exact=True)
        images = {
            given: (scaled(patch.cpu(), *bounds)[0].numpy(), where.cpu()[0].numpy()) for given, (patch, where) in rebuilt.items()
        }
        return Patch(architecture, scaled(volume, *bounds)[0].numpy(), foreground(volume)[0].numpy(), images)

    def scores(self) -> Iterator[dict[str, Any]]:
        """A row for each series of which there is something, by what was given and by which voxels are scored."""
        for given, (images, where) in self.rebuilt.items():
            masked = not given.startswith(NOTHING_HIDDEN)
            for number, series in enumerate(self.architecture.series):
                true, inside, image, hidden = (of[number] for of in (self.true, self.inside, images, where))
                if not inside.any():
                    continue
                similar = similarity(true, image)
                scored = {HIDDEN_VOXELS: hidden} if masked else {}
                for name, voxels in {**scored, WHOLE_PATCH: np.ones_like(hidden)}.items():
                    across, within = error_steps(image - true, voxels & inside, self.architecture.token_size)
                    yield {
                        "series": series,
                        "given": given,
                        "scored": name,
                        "hidden": hidden.mean() if masked else 0.0,
                        "psnr_foreground": psnr(true, image, voxels & inside),
                        "psnr": psnr(true, image, voxels),
                        "ssim_foreground": mean_where(similar, voxels & inside),
                        "ssim": mean_where(similar, voxels),
                        "across_borders": across,
                        "within_tokens": within,
                    }

    def slices(self) -> dict[str, dict[str, Any]]:
        """The middle slice of every series of which there is something: the truth, and by what was given image and rebuilt."""
        z, found = self.true.shape[1] // 2, {}
        for number, series in enumerate(self.architecture.series):
            if self.inside[number].any():
                images = {
                    given: tuple(torch.from_numpy(of[number, z].copy()) for of in both) for given, both in self.rebuilt.items()
                }
                found[series] = {"true": torch.from_numpy(self.true[number, z].copy()), "rebuilt": images}
        return found
