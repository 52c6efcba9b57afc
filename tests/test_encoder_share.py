"""What is lost without the encoder's features: found for a segmenter that needs them, and none for one that does not."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_csm.judging import encoder_share
from nnunet_csm.judging.encoder_share import EncoderShare, FeaturesOfOthers, as_dice, said, share
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.segmenter import CSMSegmenter


def segmenter() -> CSMSegmenter:
    torch.manual_seed(0)
    network = CSMSegmenter(
        2,
        2,
        series=["FLAIR", "T1w"],
        channels=[0, 1],
        token_size=[4, 4, 4],
        width=12,
        depth=2,
        num_heads=2,
        features=4,
        drop_path=0.0,
    )
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_patch_is_decoded_with_the_features_of_its_place_in_the_batch_before(batch_size: int) -> None:
    network = segmenter()
    exchanged = FeaturesOfOthers(network)
    batches = torch.randn(3, batch_size, 2, 8, 8, 8)
    torch.testing.assert_close(exchanged(batches[0]), network(batches[0]))
    for before, batch in itertools.pairwise(batches):
        found = exchanged(batch)
        features = [level.main for level in network.encode(*network.present_series(before))]
        torch.testing.assert_close(found, network.decode(network.present_series(batch)[0], features).main)
        assert not torch.allclose(found, network(batch))


@torch.no_grad()
def test_a_first_batch_does_not_count() -> None:
    share = EncoderShare(segmenter())
    outputs = dict.fromkeys(encoder_share.COUNTS, np.ones(1))
    for count in range(3):
        share.network(torch.randn(2, 2, 8, 8, 8))
        share.add(outputs, outputs)
        assert (0 if share.sums is None else share.sums[0, 0, 0]) == count


def test_dice_and_share_by_hand() -> None:
    # the third class is nowhere, but wrongly found by one of the two
    sums = np.array([[[6, 0, 0], [2, 0, 0], [2, 2, 0]], [[0, 0, 0], [2, 0, 5], [8, 2, 0]]], dtype=float)
    dice = as_dice(sums)
    assert dice == {"own_features": pytest.approx(12 / 16 / 2), "features_of_others": 0.0}
    assert share(dice) == 1.0 and "hardly" not in said(dice)
    alike = np.array([[[6, 0], [2, 0], [2, 0]], [[6, 0], [2, 5], [2, 0]]], dtype=float)
    assert share(as_dice(alike)) == 0.0
    useless: dict[str, float | None] = {"own_features": 0.5, "features_of_others": 0.49}
    assert share(useless) == pytest.approx(0.02) and "hardly reads its encoder" in said(useless)


def test_no_foreground_no_share() -> None:
    nothing = as_dice(np.zeros((2, 3, 2)))
    assert nothing == {"own_features": None, "features_of_others": None} and share(nothing) is None and said(nothing) == ""
    assert share({}) is None and share({"own_features": 0.0, "features_of_others": 0.0}) is None


@pytest.mark.parametrize("deaf", [False, True])
def test_finetuning_says_what_comes_through_the_encoder(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")

    def change(entry: dict[str, Any]) -> None:
        entry["csm"]["finetuning_schedule"]["val_iterations_per_epoch"] = 3

    trainer = make_trainer(False, change=change)
    trainer.initialize()
    network = trainer.bare_network
    if deaf:
        # nothing but the stem, whatever is learned
        encode = network.encode
        network.encode = lambda *given: [Outputs(torch.zeros_like(level.main)) for level in encode(*given)]
    trainer.run_training()
    assert trainer.bare_network is network
    found = json.loads((Path(trainer.output_folder) / encoder_share.FILE).read_text())
    assert encoder_share.read(Path(trainer.output_folder)) == found
    assert found["own_features"] > 0
    assert (found["features_of_others"] == found["own_features"]) == deaf
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    assert log.read_text().count("Encoder's share:") == 1
    assert ("hardly reads its encoder" in log.read_text()) or not deaf
