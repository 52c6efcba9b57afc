"""The parts of the plans that are ours: read, validated, written. Every room that needs a setting takes it from here.

A CSM plans file is an nnU-Net plans file. In its configuration, `architecture.arch_kwargs` is an `Architecture` and the
key `csm` is a `Recipe`; everything else is nnU-Net's own.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nnunet_csm.earlier_plans import VERSION, brought_up, network_brought_up
from nnunet_csm.errors import UserError
from nnunet_csm.host_files import check_network, check_plans
from nnunet_csm.schema import (
    Count,
    Depth,
    Index,
    JsonName,
    Name,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Size,
    Width,
    Within,
    check_width,
    from_dict,
    read_value,
)

# nnU-Net's default
STOCK_PLANS_NAME = "nnUNetPlans"
PLANS_NAME = "nnUNetCSMPlans"
JOINT_PLANS_NAME = "nnUNetCSMJointPlans"
NETWORK_CLASS = "nnunet_csm.model.segmenter.CSMSegmenter"
SPLITS = "splits_final.json"  # nnU-Net's
# of a patch: more than any GPU holds, and than 32 bits count
MOST_VOXELS = 2**31
BatchSize = Annotated[int, Within(1, 2**16)]


@dataclass(frozen=True)
class EncoderSettings:
    """Kind of the encoder, and what no comparison has settled yet.

    Attributes:
        kind: a name in `model/encoder.py`.
        positions: half periods of their embedding, in tokens: "geometric" rise from 1 to 64, "mae" (published) from pi to 31,416.
        series_embedding_std: deviation with which the embeddings of series begin; MAE draws such vectors with 0.02.
        query_key_gain: keys begin equal to queries, with this gain; 0: each by itself, as in MAE.
        embedding: one linear layer makes tokens of the voxels of all series, or one for each.
        base: channels of a convolutional encoder at full resolution; they double from level to level, up to the width.
        mlp_ratio: width within the MLP of a ViT's block, as a multiple of the ViT's.
    """

    kind: str = "vit"
    positions: Literal["geometric", "mae"] = "geometric"
    series_embedding_std: NotNegative = 0.5
    query_key_gain: NotNegative = 4.0
    embedding: Literal["shared", "by_series"] = "shared"
    base: Width = 16
    mlp_ratio: Positive = 4.0


@dataclass(frozen=True)
class FusionSettings:
    """How the segmenter makes one map of the encoder's features of all series; in the plans a block, or its name alone.

    Attributes:
        name: a name in `model/fusion.py`.
        refinement: whether the segmenter segments its uncertain voxels once more, see `model/deformable.py`: "threshold" those
            with an entropy above half of the highest, "share" the tenth with the highest.
        smoothness: weight in the loss of changes of the offset from a token to the next; of `deformable`.
    """

    name: str = "mean"
    refinement: Literal["none", "threshold", "share"] = "none"
    smoothness: NotNegative = 0.0


@dataclass(frozen=True)
class Architecture:
    """Arguments of the encoder and of the segmenter built on it (nnU-Net's `arch_kwargs`).

    `channels`: where each of the series stands in nnU-Net's tensor; channels of the dataset that are not named are not used.
    `width`, `depth`: of a ViT; of a convolutional encoder the most channels, and the blocks at each of its levels.
    `num_heads`: of a ViT, and of the classifier's pooling. `features`: channels of the decoder at its end. `drop_path`: of a ViT.
    `decoder`: of the segmenter; for a ViT UNETR's, or a light one to which nothing comes but the encoder's features; for a
    convolutional encoder a U-Net's, or a linear or non-linear head; for a U-Net by series the adaptive one.
    `stem`: how raw voxels reach the last block of UNETR's, past the encoder: in full, through a gate that starts almost closed,
    or not at all.
    `fusion`: how the segmenter makes one map of the encoder's features of all series; a name in `model/fusion.py`, or a block.
    """

    series: tuple[str, ...]
    channels: tuple[Index, ...]
    token_size: Size
    width: Width
    depth: Depth
    num_heads: Width
    features: Width
    drop_path: ShareBelowOne
    decoder: Literal["unetr", "light", "unet", "linear", "nonlinear", "adaptive"] = "unetr"
    stem: Literal["full", "gated", "none"] = "full"
    fusion: str | FusionSettings = "mean"
    encoder: EncoderSettings = EncoderSettings()

    @property
    def fusion_settings(self) -> FusionSettings:
        """The block of a fusion that only its name stands for."""
        return FusionSettings(self.fusion) if isinstance(self.fusion, str) else self.fusion

    @property
    def named(self) -> dict[str, Any]:
        """The fields by name, those of the encoder as `encoder.kind` and so on."""
        values = {name: value for name, value in vars(self).items() if name != "encoder"}
        return values | {f"encoder.{name}": value for name, value in vars(self.encoder).items()}


@dataclass(frozen=True)
class Optimization:
    """AdamW, linear warm-up over a share of the iterations, cosine decay to zero."""

    iterations_per_epoch: Count
    val_iterations_per_epoch: Count
    batch_size: BatchSize
    learning_rate: Positive
    warmup: ShareBelowOne
    weight_decay: NotNegative
    betas: tuple[ShareBelowOne, ShareBelowOne]
    layer_decay: ShareAboveZero


@dataclass(frozen=True)
class Schedule(Optimization):
    """An optimisation of a certain length."""

    num_epochs: Count

    @property
    def num_iterations(self) -> int:
        return self.num_epochs * self.iterations_per_epoch


# of the iterations, from a closed stem to an open one
STEM_OPENS = 0.1


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What the segmentation trainer does beside its schedule.

    Attributes:
        encoder: auto (the pretrained encoder of the same plans and fold), all (that of fold all), scratch, or a path.
        mirroring: nnU-Net's test-time augmentation by flips.
        frozen_share: of the iterations, the first, in which a pretrained encoder stays as it is and only the rest learns.
        stem_closed_share: of the iterations, the first, in which no voxel comes past the encoder, so that UNETR's decoder learns
            to need it; the stem then opens over `STEM_OPENS` of them.
        transferred_blocks: blocks that are loaded, counted from the input; the others start as drawn. None: all.
        ema: decay by iteration of the average of the weights that validation and prediction use; 0: the last weights.
        series_dropout: share of the training samples that lose one or more of their series, so that the segmenter learns to do
            without any of them.
        series_dropout_epochs: in which epochs they do: all, or every second one (alternating, as in A2FSeg).
        masked_loss_weight: of the pretext's own loss, on images of the fold, beside that of the segmentation.
    """

    encoder: str
    mirroring: bool
    frozen_share: ShareBelowOne = 0.0
    stem_closed_share: ShareBelowOne = 0.0
    transferred_blocks: Index | None = None
    ema: ShareBelowOne = 0.0
    series_dropout: Share = 0.0
    series_dropout_epochs: Literal["all", "alternating"] = "all"
    masked_loss_weight: NotNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """The classifier and its training, apart from its size and length.

    Attributes:
        margin: by which the box of the mask is widened on each side, as a share of its length.
        pooling: of the tokens of present series; "mask" is the mean of those that the mask covers, by the share it covers.
        freeze_encoder: train the pooling and the head only (linear probe, with `pooling` mean).
        label_smoothing: of the cross-entropy.
        class_weights: weigh classes by one over their number.
        encoder: as in `Finetuning`.
        mask_features: the head also sees how large the mask is: lengths of its box, its volume, those of its labels.
    """

    margin: NotNegative
    pooling: Literal["attentive", "mean", "mask"]
    freeze_encoder: bool
    label_smoothing: ShareBelowOne
    class_weights: bool
    encoder: str
    mask_features: bool = False


@dataclass(frozen=True, kw_only=True)
class Classification(ClassifierSettings):
    """All of a classifier's settings.

    Attributes:
        patch_size: around the mask, a multiple of the token size.
        schedule: in samples (cases or lesions) for crops.
        scale: by which factor what the patch holds is made smaller: "each" by its own, 1 where it fits, or one for all.
    """

    patch_size: Size
    schedule: Schedule
    scale: Literal["each"] | Positive = "each"


@dataclass(frozen=True)
class Source:
    """Preprocessed images that pretraining draws on.

    Attributes:
        dataset: DatasetXXX_Name.
        subset: imagesTr, or imagesTs for test images, which no fold holds back.
        labelled: nnU-Net's own preprocessed data; False for images that were preprocessed without labels.
        data_identifier: the folder of it below the preprocessed dataset.
        num_channels: of each case there.
        channels: series name to its channel; channels that are not named are not used.
        absent_series: case to series that it holds only as a copy of another one, and that count as absent.
        weight: how often pretraining draws a case of it, beside those of other sources; in plans only where it is not 1.
    """

    dataset: Name
    subset: Literal["imagesTr", "imagesTs"]
    labelled: bool
    data_identifier: Name
    num_channels: Count
    channels: dict[str, Index]
    absent_series: dict[Name, tuple[str, ...]]
    weight: Positive = 1.0


@dataclass(frozen=True)
class Recipe:
    """The `csm` block of a configuration.

    Attributes:
        sources: what pretraining draws on; the first is of the dataset whose results folder holds the pretrained encoder.
        pretext: what pretraining learns from, by `name`, with that pretext's own settings, see `pretext/base.py`.
        reasons: for each decision, its value as text and why.
        splits: file with the folds, in the preprocessed folder of each labelled dataset; a study brings its own.
    """

    version: int
    preset: str
    seed: Seed
    sources: tuple[Source, ...]
    pretraining_patch_size: Size
    pretext: dict[str, Any]
    pretraining: Schedule
    finetuning_schedule: Schedule
    finetuning: Finetuning
    classification: Classification
    reasons: dict[str, tuple[str, str]]
    splits: JsonName = SPLITS


@dataclass(frozen=True)
class Configuration:
    """One configuration of a CSM plans file, as our rooms read it."""

    patch_size: Size
    architecture: Architecture
    csm: Recipe

    @property
    def pretraining_architecture(self) -> Architecture:
        """The network of pretraining: as that of fine-tuning, with the series of all sources, in order of appearance."""
        series = tuple(dict.fromkeys(name for source in self.csm.sources for name in source.channels))
        return dataclasses.replace(self.architecture, series=series, channels=tuple(range(len(series))))

    @property
    def pretraining_grid(self) -> Size:
        """Tokens along (z, y, x) of a patch in pretraining."""
        z, y, x = (p // t for p, t in zip(self.csm.pretraining_patch_size, self.architecture.token_size, strict=True))
        return z, y, x


def read_configuration(plans: Mapping[str, Any], name: str, source: str) -> Configuration:
    """Read and validate configuration `name` of a CSM plans file; `source` is the path that errors name.

    Raises:
        UserError: no such configuration, no `csm` block, an unknown or missing key, a value of the wrong type, or a
            patch that is no multiple of the token.
    """
    return parse_configuration(configuration_of(plans, name, source), f"{source}: configurations.{name}")


def read_architecture(plans: Mapping[str, Any], name: str, source: str) -> Architecture:
    """Only the network of a configuration: what a checkpoint of another version must still tell.

    Raises:
        UserError: no such configuration, or not a network of ours.
    """
    return _architecture(configuration_of(plans, name, source), f"{source}: configurations.{name}")


def _architecture(entry: Mapping[str, Any], where: str) -> Architecture:
    where = f"{where}.architecture"
    network = read_value(dict[str, Any], entry.get("architecture"), where)
    check_network(network, where, NETWORK_CLASS)
    return parse_architecture(network["arch_kwargs"], f"{where}.arch_kwargs")


def parse_architecture(kwargs: Any, where: str) -> Architecture:
    """Read nnU-Net's `arch_kwargs`, also those of plans before version 3."""
    return from_dict(Architecture, network_brought_up(kwargs), where)


def configuration_of(plans: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """A configuration of plans, ours or nnU-Net's, with its inheritance resolved.

    Raises:
        UserError: there is none of that name, or what is to be a name in the plans is a path.
    """
    check_plans(plans, source)
    configurations = plans["configurations"]
    if name not in configurations:
        raise UserError(f"{source}: no configuration {name!r}, expected one of {sorted(configurations)}; choose with -c")
    entry: dict[str, Any] = configurations[name]
    parent = entry.get("inherits_from")
    while parent is not None:
        # as nnU-Net does, whose own class takes seconds to import
        above: dict[str, Any] = configurations[parent]
        entry, parent = {**above, **entry}, above.get("inherits_from")
    return entry


def parse_configuration(entry: Mapping[str, Any], where: str) -> Configuration:
    """Do as `read_configuration`, for the configuration's own dictionary (nnU-Net's `ConfigurationManager.configuration`)."""
    if "csm" not in entry:
        raise UserError(f"{where} has no 'csm' block; write CSM plans with `nnunet_csm plan -d ID` and choose them with -p")
    configuration = Configuration(
        patch_size=read_value(Size, entry.get("patch_size"), f"{where}.patch_size"),
        architecture=_architecture(entry, where),
        csm=from_dict(Recipe, brought_up(entry)["csm"], f"{where}.csm"),
    )
    _check(configuration, where)
    # nnU-Net reads the one, people edit the other
    if entry.get("batch_size") != configuration.csm.finetuning_schedule.batch_size:
        raise UserError(
            f"{where}.batch_size is {entry.get('batch_size')}, csm.finetuning_schedule.batch_size is "
            f"{configuration.csm.finetuning_schedule.batch_size}; make them equal"
        )
    return configuration


def _check(configuration: Configuration, where: str) -> None:
    patch_size, architecture, csm = configuration.patch_size, configuration.architecture, configuration.csm
    token_size = architecture.token_size
    if csm.version != VERSION:
        raise UserError(f"{where}.csm.version is {csm.version}, expected {VERSION}; plan again with `nnunet_csm plan`")
    if any(t & (t - 1) for t in token_size) or max(token_size) < 2:
        raise UserError(f"{where}: token_size {token_size} must be powers of two, at least one of them above 1")
    patches = {"patch_size": patch_size, "csm.pretraining_patch_size": csm.pretraining_patch_size}
    for name, size in (patches | {"csm.classification.patch_size": csm.classification.patch_size}).items():
        if any(p % t for p, t in zip(size, token_size, strict=True)):
            raise UserError(
                f"{where}: {name} {size} is not a multiple of token_size {token_size}; "
                f"edit one of them or plan again with `nnunet_csm plan`"
            )
        if size == token_size:
            raise UserError(f"{where}: {name} {size} is a single token; a patch holds several: make it larger")
        if math.prod(size) > MOST_VOXELS:
            raise UserError(f"{where}: {name} {size} is more than {MOST_VOXELS:,} voxels; make it smaller")
    series, channels = architecture.series, architecture.channels
    if not series or len(set(series)) != len(series) or len(set(channels)) != len(channels) or len(series) != len(channels):
        raise UserError(f"{where}: series {series} in channels {channels}; expected one channel of its own for every series")
    if not csm.sources:
        raise UserError(f"{where}.csm.sources is empty; pretraining needs images: plan again with `nnunet_csm plan`")
    check_width(architecture.width, architecture.num_heads, f"{where}: arch_kwargs")
    for number, source in enumerate(csm.sources):
        used = source.channels.values()
        if not used or max(used) >= source.num_channels or len(set(used)) < len(used):
            raise UserError(
                f"{where}.csm.sources[{number}] has {source.num_channels} channels, and series in {source.channels}; expected "
                f"one of these channels, from 0 on, for every series"
            )
    if csm.finetuning.stem_closed_share and (architecture.stem == "none" or architecture.decoder != "unetr"):
        raise UserError(
            f"{where}.csm.finetuning.stem_closed_share is {csm.finetuning.stem_closed_share}, but the network has no stem; make "
            f"it 0, or set decoder to 'unetr' and stem to 'full' in arch_kwargs"
        )
