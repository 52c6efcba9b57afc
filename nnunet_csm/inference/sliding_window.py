"""nnU-Net's sliding window with tiles in batches and without the tokens of absent series: the same logits, sooner.

Tiles, weights, the order of every sum and its precision are nnU-Net's, so that results differ from its own by what a network
differs by when it sees a sample in another batch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor
from torch._dynamo import OptimizedModule
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.model.planned import series_present
from nnunet_csm.model.segmenter import CSMSegmenter

MIB, GIB = 2**20, 2**30
Tile = tuple[slice | int, ...]

# 18 patches of 96 x 96 x 96 (assumed to keep a GPU busy, not measured); far from 2**31 elements in a tensor of the decoder
MAX_VOXELS = 2**24
# of free memory; the rest is for what differs from batch to batch
MEMORY_SHARE = 0.7
# Samples at once where free memory is no guide; others as stock. On a CPU torch convolves a single small sample without
# oneDNN, which takes 1.4 times as long; more than two samples take no less time each.
NUM_SAMPLES = {"cpu": 2}


class BatchedPredictor(nnUNetPredictor):
    """nnU-Net's predictor with another loop over the tiles.

    On a GPU the first tile goes alone and tells the memory of a sample; from then on batches have the size that free memory
    allows, and half of it whenever memory runs out all the same. A network that is not ours gets the same batches.

    Attributes:
        num_samples: patches, mirrored ones included, that pass the network together at most; None before it is known.
        one_pass: axes of the one mirrored pass to be made; None for all of them.
        given_up: a file that is there when an output could not be written.
    """

    list_of_parameters: list[dict[str, Any]]  # nnU-Net's: the weights of each fold
    num_samples: int | None = None
    one_pass: tuple[int, ...] | None = None
    given_up: Path | None = None

    def predict_from_data_iterator(self, data_iterator: Iterator[Any], *given: Any, **named: Any) -> Any:
        """As stock, but no further case is predicted when one could not be written; its error is told by then."""
        wanted = takewhile(lambda _: self.given_up is None or not self.given_up.exists(), data_iterator)
        return super().predict_from_data_iterator(wanted, *given, **named)

    def members(self, data: Tensor) -> Iterator[Tensor]:
        """Logits (class, z, y, x) of a preprocessed image under each fold and mirrored pass alone, one after the other."""
        folds = self.list_of_parameters
        try:
            for weights in folds:
                self.list_of_parameters = [weights]
                for flip in self._flips(data.ndim + 1):
                    self.one_pass = flip
                    yield self.predict_logits_from_preprocessed_data(data)
                    self.one_pass = None
        finally:
            self.list_of_parameters, self.one_pass = folds, None

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[Tile], do_on_device: bool = True
    ) -> Tensor:
        """Logits of a padded image, in fp16 as stock's.

        Args:
            data: (channel, z, y, x).
            slicers: the tiles, each an index into `data`.
            do_on_device: keep image and results on the network's device, otherwise in the CPU's memory.

        Raises:
            UserError: a sum that fp16 cannot hold.
            RuntimeError: no memory even for one sample.
        """
        device = self.device if do_on_device else torch.device("cpu")
        data = data.to(device)
        logits = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half, device=device)
        weights = torch.zeros(data.shape[1:], dtype=torch.half, device=device)
        gaussian = torch.ones((), device=device)
        if self.use_gaussian:
            patch_size = tuple(self.configuration_manager.patch_size)
            gaussian = compute_gaussian(patch_size, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
        with tqdm(total=len(slicers), disable=not self.allow_tqdm) as bar:
            for tiles, predicted in self._predict_tiles(data, slicers):
                for tile, prediction in zip(tiles, predicted.to(device), strict=True):
                    logits[tile] += prediction.mul_(gaussian)
                    weights[tile[1:]] += gaussian
                bar.update(len(tiles))
        torch.div(logits, weights, out=logits)
        if torch.any(torch.isinf(logits)):
            raise UserError("logits are too large for sums in fp16: the training of this checkpoint has diverged; train it again")
        return logits

    def _predict_tiles(self, data: Tensor, slicers: Sequence[Tile]) -> Iterator[tuple[Sequence[Tile], Tensor]]:
        """Tiles in nnU-Net's order, a batch at a time, with their logits (tile, class, z, y, x)."""
        flips = self._flips(data.ndim + 1)
        if self.device.type != "cuda" and self.num_samples is None:
            self.num_samples = NUM_SAMPLES.get(self.device.type, 1)
        shown_in_tiles = zip(slicers, self._series_shown(data, slicers), strict=True)
        for shown, run in itertools.groupby(shown_in_tiles, itemgetter(1)):
            left = [tile for tile, _ in run]
            while left:
                num_tiles, num_passes = share_out(self.num_samples or len(flips), len(flips), len(left))
                tiles = left[:num_tiles]
                predicted, before = None, self._start_watching_memory() if self.num_samples is None else 0
                try:
                    patches = torch.stack([data[tile] for tile in tiles]).to(self.device)
                    predicted = self._mean_over_flips(patches, shown, flips, num_passes)
                except torch.cuda.OutOfMemoryError:
                    if num_tiles * num_passes == 1:
                        raise
                if predicted is None:
                    # only here, where the exception no longer keeps the tensors of its frames
                    torch.cuda.empty_cache()
                    self.num_samples = num_tiles * num_passes // 2
                    print(f"{num_tiles} tiles x {num_passes} passes did not fit into GPU memory; going on with half of it")
                    continue
                if self.num_samples is None:
                    self.num_samples = self._num_samples_that_fit(before, num_tiles * num_passes, patches[0, 0].numel())
                yield tiles, predicted
                left = left[num_tiles:]

    def _flips(self, num_axes: int) -> list[tuple[int, ...]]:
        """The axes of every mirrored pass over a batch with `num_axes`, beginning with none, or of the one asked for."""
        if self.one_pass is not None:
            return [self.one_pass]
        allowed = self.allowed_mirroring_axes if self.use_mirroring and self.allowed_mirroring_axes else ()
        axes = [axis + 2 for axis in allowed]
        assert max(axes, default=0) < num_axes, f"mirroring axes {allowed} of a network with {num_axes - 2} spatial axes"
        return [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]

    def _series_shown(self, data: Tensor, slicers: Sequence[Tile]) -> list[tuple[int, ...] | None]:
        """Numbers of the series present in each tile; None for a network that is not ours."""
        network = self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network
        if not isinstance(network, CSMSegmenter):
            return [None] * len(slicers)
        # fetched together, so that a GPU is waited for once
        present = torch.cat([series_present(network.planned_series(data[tile][None])) for tile in slicers]).tolist()
        return [tuple(number for number, shows in enumerate(row) if shows) for row in present]

    def _mean_over_flips(
        self, patches: Tensor, shown: tuple[int, ...] | None, flips: Sequence[tuple[int, ...]], num_passes: int
    ) -> Tensor:
        """Logits of patches, averaged over mirrored passes, `num_passes` of which are made at once."""
        known = {} if shown is None else {"shown": shown}
        total: Tensor | None = None
        for start in range(0, len(flips), num_passes):
            together = flips[start : start + num_passes]
            mirrored = torch.cat([patches.flip(flip) for flip in together]) if len(together) > 1 else patches.flip(together[0])
            for flip, logits in zip(together, self.network(mirrored, **known).split(len(patches)), strict=True):
                turned = logits.flip(flip) if flip else logits
                total = turned if total is None else total.add_(turned)
        assert total is not None
        return total.div_(len(flips)) if len(flips) > 1 else total

    def _start_watching_memory(self) -> int:
        """Bytes allocated on the GPU so far."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _num_samples_that_fit(self, before: int, num_samples: int, voxels: int) -> int:
        """Patches of `voxels` that free GPU memory can hold, after `num_samples` took it from `before` bytes to its peak."""
        each = max(1, (torch.cuda.max_memory_allocated(self.device) - before) // num_samples)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - before
        chosen = max(1, min(MAX_VOXELS // voxels, int(MEMORY_SHARE * free) // each))
        print(f"Up to {chosen} patches at once: {free / GIB:.1f} GiB are free, {math.ceil(each / MIB)} MiB a patch measured")
        return chosen


def share_out(num_samples: int, num_passes: int, num_left: int) -> tuple[int, int]:
    """How many of `num_left` tiles, and of their mirrored passes, at once; where not all passes of a tile fit, a part of them.

    Powers of two, as the number of passes is, since cuDNN tries its algorithms again for every other size.
    """
    num_tiles = min(max(1, num_samples // num_passes), num_left)
    return _floor_power_of_two(num_tiles), min(num_passes, _floor_power_of_two(max(1, num_samples)))


def _floor_power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)
