"""Convolutional encoders: their levels, and everything that is built on an encoder."""

import math
from typing import Any

import pytest
import torch

from nnunet_csm.errors import UserError
from nnunet_csm.model.classifier import CSMClassifier
from nnunet_csm.model.encoder import ENCODERS, build_encoder
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import grid_size
from nnunet_csm.model.transfer import PretrainedEncoder, transfer
from nnunet_csm.plans import Architecture, EncoderSettings
from nnunet_csm.schema import to_dict

SERIES = ("FLAIR", "T1w", "T2w")
KINDS = [kind for kind, path in ENCODERS.items() if ".pyramid." in path]
PATCH = (4, 16, 24)


def architecture_of(kind, decoder="unet", series=SERIES, **changes):
    values: dict[str, Any] = {"token_size": (2, 8, 4), "width": 24, "depth": 2, "num_heads": 2, "features": 4, "drop_path": 0.0}
    encoder = EncoderSettings(kind=kind, base=8)
    return Architecture(series, tuple(range(len(series))), decoder=decoder, encoder=encoder, **(values | changes))


def pyramid_of(architecture) -> Any:
    return build_encoder(architecture)


def segmenter_of(architecture) -> Any:
    return CSMSegmenter(len(architecture.series), 3, **to_dict(architecture))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_halve_thin_axes_last_and_double_channels_up_to_the_width(kind):
    encoder = pyramid_of(architecture_of(kind))
    maps = encoder.maps(torch.randn(2, 3, *PATCH))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 4, 16, 24), (16, 4, 8, 24), (24, 4, 4, 12), (24, 2, 2, 6)]
    assert encoder.level_widths == [8, 16, 24, 24]


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_patch_lie_on_the_token_grid(kind):
    architecture = architecture_of(kind)
    encoder = pyramid_of(architecture)
    volume, present = torch.randn(2, 3, *PATCH), torch.ones(2, 3, dtype=torch.bool)
    (features,) = encoder.levels(volume, present)
    assert features.grid == grid_size(PATCH, architecture.token_size)
    assert features.tokens.shape == (2, 1, math.prod(features.grid), encoder.width)
    assert features.present.shape == (2, 1) and features.present.all()
    # of several, each is the map of its level
    for level, m in zip(encoder.levels(volume, present, 4), encoder.maps(volume), strict=True):
        torch.testing.assert_close(level.tokens[:, 0].mT.reshape(m.shape), m)


def test_the_end_of_the_fpn_has_the_mean_of_every_level():
    encoder = pyramid_of(architecture_of("fpn"))
    maps = encoder.maps(torch.randn(2, 3, *PATCH))
    assert encoder.width == sum(encoder.level_widths)
    torch.testing.assert_close(encoder.end(maps).mean((2, 3, 4)), torch.cat([m.mean((2, 3, 4)) for m in maps], 1))


@pytest.mark.parametrize("decoder", ["unet", "linear", "nonlinear"])
@pytest.mark.parametrize("kind", KINDS)
def test_segmenters_take_any_subset_of_series_and_all_of_them_learn(kind, decoder):
    network = segmenter_of(architecture_of(kind, decoder))
    volume = torch.randn(2, 3, *PATCH)
    volume[1, 0] = 0
    logits = network(volume)
    assert logits.shape == (2, 3, *PATCH)
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    # `shown` leaves out what is absent anyway
    network.eval()
    only = volume[1:].clone()
    torch.testing.assert_close(network(only, shown=(1, 2)), network(only))


def test_the_linear_head_is_the_sum_over_levels():
    network = segmenter_of(architecture_of("plain_unet", "linear"))
    volume = torch.randn(1, 3, *PATCH)
    maps, layers = network.encoder.maps(volume), network.decoder.seg_layers
    expected = sum(torch.nn.functional.interpolate(layer(m), PATCH) for layer, m in zip(layers, maps, strict=True))
    torch.testing.assert_close(network(volume), expected)
    assert [layer.bias is not None for layer in layers] == [True, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_classifiers_take_them(kind, pooling):
    architecture = architecture_of(kind, num_heads=3, width=27 - 3)
    classifier = CSMClassifier(3, 2, pooling=pooling, **to_dict(architecture))
    assert classifier(torch.randn(2, 3, *PATCH)).shape == (2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_carried_by_the_name_of_a_series(kind):
    source, target = architecture_of(kind), architecture_of(kind, series=("T2w", "FLAIR"))
    encoder, network = pyramid_of(source), segmenter_of(target)
    rows = transfer(PretrainedEncoder("here", source, encoder.state_dict()), network.encoder, target)
    assert {row.name for row in rows} >= {"embedding.weight[T2w]", "embedding.weight[FLAIR]"}
    volume = torch.randn(1, 3, *PATCH)
    volume[:, 1] = 0
    expected, found = encoder.maps(volume)[-1], network.encoder.maps(volume[:, [2, 0]])[-1]
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="takes FLAIR, T1w, T2w, this run also needs ADC"):
        transfer(
            PretrainedEncoder("here", source, encoder.state_dict()),
            pyramid_of(architecture_of(kind, series=("ADC",))),
            architecture_of(kind, series=("ADC",)),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_levels", [0, 2, 4])
def test_the_first_levels_can_be_transferred_by_themselves(kind, num_levels):
    architecture = architecture_of(kind)
    source, target = pyramid_of(architecture), pyramid_of(architecture)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    transfer(PretrainedEncoder("here", architecture, source.state_dict()), target, architecture, num_levels)
    for name, tensor in target.state_dict().items():
        room, number = name.split(".")[:2]
        loaded = num_levels == 4 or room == "embedding" or (room == "blocks" and int(number) < num_levels)
        assert tensor.equal((source.state_dict() if loaded else before)[name]), name


def test_every_parameter_of_a_stage_is_named_once():
    for kind in KINDS:
        encoder = pyramid_of(architecture_of(kind))
        named = [id(parameter) for stage in encoder.stages() for parameter in stage]
        assert len(set(named)) == len(named) and len(encoder.stages()) == 1 + encoder.num_blocks(architecture_of(kind))


@pytest.mark.parametrize(
    ("kind", "decoder"), [("vit", "unet"), ("joint_vit", "linear"), ("fpn", "unetr"), ("plain_unet", "light")]
)
def test_a_decoder_that_cannot_read_the_encoder_is_refused(kind, decoder):
    with pytest.raises(UserError, match=f"decoder in arch_kwargs is '{decoder}', but encoder.kind '{kind}' takes"):
        segmenter_of(architecture_of(kind, decoder, depth=3))


@pytest.mark.parametrize(("base", "depth"), [(7, 2), (26, 2), (0, 2), (8, 0)])
def test_sizes_that_cannot_be_are_refused(base, depth):
    architecture = Architecture(
        SERIES, (0, 1, 2), (2, 8, 4), 24, depth, 2, 4, 0.0, decoder="unet", encoder=EncoderSettings(kind="fpn", base=base)
    )
    with pytest.raises(UserError, match=f"encoder.base is {base}, width 24, depth {depth}"):
        pyramid_of(architecture)


def test_published_sizes():
    """PCRLv2's convolutions and vox2vec's 1,008 numbers (shared sizes of their papers)."""
    pcrl = Architecture(SERIES, (0, 1, 2), (8, 8, 8), 512, 2, 8, 4, 0.0, "unet", encoder=EncoderSettings("plain_unet", base=64))
    encoder = pyramid_of(pcrl)
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv3d)]
    expected = [(3, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == expected
    vox = Architecture(SERIES, (0, 1, 2), (32, 32, 32), 512, 2, 8, 4, 0.0, "linear", encoder=EncoderSettings("fpn", base=16))
    assert pyramid_of(vox).width == 1008
