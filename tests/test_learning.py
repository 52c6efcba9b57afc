"""Pretraining learns: hidden tokens of phantoms it never saw are rebuilt better than by the mean of a series."""

from typing import Any

import numpy as np
import pytest
import torch
from factories import loss_of, make_csm

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.tokens import select, to_tokens
from nnunet_csm.phantom import PhantomSpec, draw_subject
from nnunet_csm.plans import Architecture, EncoderSettings
from nnunet_csm.pretext.base import Batch, Setup, read_pretext
from nnunet_csm.pretext.masking import Mask, Masking, ask_some, draw_mask
from nnunet_csm.pretext.rebuilding import Reconstruction, masked_mean

SPEC = PhantomSpec(series=("FLAIR", "T1w", "T2w"), shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0))
TOKEN_SIZE, NUM_TOKENS, NUM_TRAINING, NUM_STEPS = (4, 8, 8), 64, 6, 60
MASKING = Masking(mask_ratio=0.5, places="independent", hidden_series="rebuilt")


def volumes(subjects: range) -> torch.Tensor:
    """Z-scored series of phantoms (b, s, z, y, x)."""
    drawn = np.stack([list(draw_subject(SPEC, index).series.values()) for index in subjects])
    axes = (2, 3, 4)
    return torch.from_numpy((drawn - drawn.mean(axes, keepdims=True)) / drawn.std(axes, keepdims=True)).float()


def draw(seed: int, num: int, num_shown: int) -> Mask:
    return draw_mask(Draws(seed, torch.arange(num)), torch.ones(num, 3, dtype=torch.bool), num_shown, NUM_TOKENS, MASKING)


def test_hidden_tokens_of_others_are_rebuilt_better_than_by_the_mean() -> None:
    torch.manual_seed(0)
    architecture = Architecture(SPEC.series, (0, 1, 2), TOKEN_SIZE, 48, 2, 4, features=4, drop_path=0.0)
    model = make_csm(architecture, Reconstruction(48, 1, 4, normalize_targets=False, rebuilt_share=0.5), MASKING, SPEC.shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    training, others = volumes(range(NUM_TRAINING)), volumes(range(NUM_TRAINING, NUM_TRAINING + 4))
    for step in range(NUM_STEPS):
        mask = ask_some(draw(step, NUM_TRAINING, 1 + step % 2), Draws(step, torch.arange(NUM_TRAINING)), 0.5)
        optimizer.zero_grad()
        loss_of(model, training, mask).backward()
        optimizer.step()
    mask = draw(NUM_STEPS, 4, 1)
    with torch.no_grad():
        found = float(loss_of(model, others, mask))
        # z-scored series have a mean of 0
        of_the_mean = float(masked_mean(select(to_tokens(others, TOKEN_SIZE), mask.asked).square().mean(-1), mask))
    assert found < 0.6 * of_the_mean


DECODER = {"width": 48, "depth": 1, "num_heads": 4, "normalize_targets": False}
INDEPENDENT = {"mask_ratio": 0.5, "places": "independent"}
OTHERS: dict[str, tuple[dict[str, Any], EncoderSettings]] = {
    "mae3d": ({"masking": {"mask_ratio": 0.5}, "reconstruction": DECODER}, EncoderSettings("joint_vit")),
    "maesil": ({"masking": {"mask_ratio": 0.25}, "reconstruction": DECODER, "noise": [0.0, 0.1]}, EncoderSettings("joint_vit")),
    "csm, pooled": (
        {
            "masking": INDEPENDENT | {"hidden_series": "rebuilt", "fewest_hidden": 0, "counts": "pooled"},
            "reconstruction": DECODER,
        },
        EncoderSettings(),
    ),
    "csm, dirichlet": (
        {"masking": INDEPENDENT | {"hidden_series": "none", "counts": "dirichlet"}, "reconstruction": DECODER},
        EncoderSettings(embedding="by_series"),
    ),
    # a teacher and a centre that stay, as the loss tells nothing while they move
    "dino": (
        {
            "head": {"hidden": 32, "bottleneck": 16, "num_prototypes": 32},
            "momentum": 1.0,
            "centre_momentum": 1.0,
            "drop_path": 0.0,
            "frozen_share": 0.0,
        },
        EncoderSettings("joint_vit"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_leave_the_untrained_network_behind_on_phantoms_it_never_saw(name: str) -> None:
    torch.manual_seed(0)
    block, encoder = OTHERS[name]
    architecture = Architecture(SPEC.series, (0, 1, 2), TOKEN_SIZE, 48, 3, 4, features=4, drop_path=0.0, encoder=encoder)
    cls, settings = read_pretext({"name": name.split(",")[0], **block}, architecture, "pretext")
    pretext = cls(Setup(architecture, settings, SPEC.shape))
    training, others = volumes(range(NUM_TRAINING)), volumes(range(NUM_TRAINING, NUM_TRAINING + 4))
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=3e-3)

    def drawn_for(volume: torch.Tensor, seed: int, learns: bool) -> Batch:
        samples, present = torch.arange(len(volume)), torch.ones(len(volume), 3, dtype=torch.bool)
        # of several kinds, the last
        variant = int(pretext.variants(present).shape[1] - 1)
        return Batch((volume,), pretext.draw(Draws(seed, samples), present, variant, (volume,), learns))

    def validated() -> float:
        pretext.eval()
        with torch.no_grad():
            total, num = pretext.validate(drawn_for(others, 1000, False))["loss"]
        return float(total / num)

    before = validated()
    for step in range(NUM_STEPS):
        pretext.train()
        batch = drawn_for(training, step, True)
        optimizer.zero_grad()
        (pretext(*batch.args) / pretext.weight(batch.drawn)).backward()
        optimizer.step()
        pretext.after_step((step + 1) / NUM_STEPS)
    assert validated() < 0.5 * before
