"""What a study compares: a JSON file that names arms, label shares and repeats. The files are in `plans/studies/`."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any, Literal

from nnunet_csm.errors import UserError
from nnunet_csm.inheritance import read_inherited, shipped_names
from nnunet_csm.schema import Count, Name, ShareAboveZero, Within, from_dict

FOLDER = files("nnunet_csm.presets") / "studies"


# each is a training
Numbers = Annotated[int, Within(1, 1000)]


@dataclass(frozen=True)
class Repeats:
    """How often everything is done again, each time on other training patients or with other seeds.

    Attributes:
        kind: "splits" are random divisions 8:1:1 by patient, as in the paper, the first ten of which test every patient once;
            "folds" test every patient once, in `number` folds, and take a tenth of the others to validate.
        number: of splits or folds. Each has a pretraining of its own, on its training patients only.
        seeds: of each of them, from one pretraining: other labelled patients, other initial weights of the decoder, other
            batches.
    """

    kind: Literal["splits", "folds"]
    number: Numbers
    seeds: Numbers = 1


@dataclass(frozen=True)
class Incomplete:
    """Series taken away at random from fine-tuning and test cases: `remove` of each of a `share` of the cases."""

    share: ShareAboveZero
    remove: tuple[Count, ...]


@dataclass(frozen=True)
class StockArm:
    """Stock nnU-Net for the time that another arm took.

    Attributes:
        plans: nnU-Net's, such as nnUNetPlans or nnUNetResEncUNetMPlans.
        minutes_of: the arm whose mean time of fine-tuning it gets.
        with_pretraining: and that of its pretraining.
    """

    plans: Name
    minutes_of: str
    with_pretraining: bool


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: what the row is called.
        method: a preset whose changes to what it inherits from (B, for those shipped) are made to the study's preset first.
        changes: to that, as a preset file has them; what concerns pretraining tells pretrainings apart.
        pretrained: False for initial weights.
        encoder: weights that it starts from instead of a pretraining of its own, such as those of another dataset: what
            `hub.find_weights` takes, with environment variables, `{division}` in it being the number of the division.
        pretraining_series: names of the series that pretraining sees, or how many of the dataset's first; all when None.
        incomplete: fine-tune and test with series missing.
        nnunet: stock nnU-Net instead.
        mask_volumes: a forest of the volumes of the masks' labels instead, which sees no image: folders of the raw dataset with
            a mask for every case, such as labelsTr.
    """

    name: str
    changes: dict[str, Any]
    method: str = ""
    pretrained: bool = True
    encoder: str = ""
    pretraining_series: tuple[str, ...] | Count | None = None
    incomplete: Incomplete | None = None
    nnunet: StockArm | None = None
    mask_volumes: tuple[Name, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether its networks are ours; the others need none, or wait for them."""
        return self.nnunet is None and not self.mask_volumes


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        description: said above the tables.
        task: which fine-tuning; "reconstruction" has none, and scores what the pretrainings themselves rebuild.
        preset: of all arms.
        changes: to it, for all arms.
        repeats: see there.
        arms: rows.
        labels: shares of the training patients that are labelled; the smaller hold patients of the larger.
        baseline: the arm that all others are compared with; the first when empty.
        finetuned: "all" series, "each" by itself and their mean, or "both".
        tested: the series given at test time, to one network: "all"; "one_missing": all, and all but each; "subsets": every
            non-empty subset.
        search: path in the preset (`finetuning.learning_rate`) to values: every arm, label share and division takes the values
            that are best on the validation patients of the division, with its first seed; every arm tries as many.
        structures: labels or regions to report, as far as the dataset has them; when none, the regions that the labels imply,
            else the labels.
        test_images: whether pretraining also draws on the images in imagesTs, which no arm is tested on.
    """

    description: str
    task: Literal["segmentation", "classification", "reconstruction"]
    preset: str
    changes: dict[str, Any]
    repeats: Repeats
    arms: tuple[Arm, ...]
    labels: tuple[ShareAboveZero, ...] = (1.0,)
    baseline: str = ""
    finetuned: Literal["all", "each", "both"] = "all"
    tested: Literal["all", "one_missing", "subsets"] = "all"
    search: dict[str, Any] = field(default_factory=dict)
    structures: tuple[str, ...] = ()
    test_images: bool = False

    @property
    def baseline_arm(self) -> str:
        return self.baseline or self.arms[0].name


def study_names() -> list[str]:
    """Studies that come with the package."""
    return shipped_names(FOLDER)


def read_study(name: str) -> Study:
    """A shipped study by name, or a study file by path.

    Raises:
        UserError: no such file, not JSON, unknown keys, or settings that contradict each other.
    """
    # key by key; arms are replaced as a whole
    return parse_study(read_inherited("study", name, FOLDER, operator.or_), f"study {name}")


def parse_study(data: Mapping[str, Any], where: str) -> Study:
    """Do as `read_study`, for what stands in the file."""
    arms = data.get("arms", [])
    if isinstance(arms, list):
        arms = [{"changes": {}, **arm} if isinstance(arm, Mapping) else arm for arm in arms]
    study = from_dict(Study, {"changes": {}, **data, "arms": arms}, where)
    _check(study, where)
    return study


def _check(study: Study, where: str) -> None:
    names = [arm.name for arm in study.arms]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{where}: arms {', '.join(names) or 'none'}; expected at least one, each with a name of its own")
    if study.baseline_arm not in names:
        raise UserError(f"{where}: baseline {study.baseline!r} is none of the arms {', '.join(names)}")
    if not study.labels or len(set(study.labels)) < len(study.labels):
        raise UserError(f"{where}: labels {study.labels}; expected shares above 0 and up to 1, each once")
    if study.repeats.number < (2 if study.repeats.kind == "folds" else 1):
        raise UserError(f"{where}: repeats {study.repeats}; expected at least 1 split or 2 folds, and at least 1 seed")
    idle = OTHER_TASKS_KEYS[study.task]
    given = {path.split(".")[0]: f"search.{path}" for path in study.search}
    given |= {key: f"changes of arm {arm.name!r}: {key}" for arm in study.arms for key in arm.changes}
    if wrong := sorted(given.keys() & idle):
        raise UserError(
            f"{where}: {given[wrong[0]]} does nothing for {study.task}; a classifier's settings are in `classification`, its "
            f"learning rate is classification.schedule.learning_rate, a segmenter's finetuning.learning_rate"
        )
    for path, values in study.search.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise UserError(f"{where}: search.{path} is {values!r}, expected a list of values to try")
        first, *others = path.split(".")
        if first in PRETRAINING_KEYS or (first == "network" and set(others) & ENCODER_KEYS):
            raise UserError(f"{where}: search.{path} concerns pretraining; make arms of its values, so that each is shown")
    for arm in study.arms:
        _check_arm(study, arm, f"{where}: arm {arm.name!r}")
    if study.task == "reconstruction":
        _check_without_finetuning(study, where)
    segments = [arm.name for arm in study.arms if arm.nnunet is not None or arm.incomplete is not None]
    if study.task == "classification" and segments:
        raise UserError(f"{where}: arms {', '.join(segments)}: stock nnU-Net and incomplete series are for segmentation")


def _check_without_finetuning(study: Study, where: str) -> None:
    """Raise UserError for what a study of reconstructions would not heed."""
    plain = Study("", "reconstruction", "", {}, study.repeats, study.arms)
    names = ("labels", "finetuned", "tested", "search", "structures")
    idle = [name for name in names if getattr(study, name) != getattr(plain, name)]
    idle += ["repeats.seeds"] * (study.repeats.seeds > 1)
    for arm in study.arms:
        stated = {"pretrained": not arm.pretrained, "encoder": arm.encoder, "incomplete": arm.incomplete, "nnunet": arm.nnunet}
        idle += [f"arm {arm.name!r}: {name}" for name, is_stated in stated.items() if is_stated]
    if idle:
        raise UserError(f"{where}: {idle[0]} does nothing for reconstruction, which trains no segmenter; leave it out")


def _check_arm(study: Study, arm: Arm, where: str) -> None:
    if arm.nnunet is not None:
        others = [one.name for one in study.arms if one.is_trained]
        if arm.nnunet.minutes_of not in others:
            raise UserError(f"{where}: minutes_of is {arm.nnunet.minutes_of!r}, expected one of the arms {', '.join(others)}")
        if arm != Arm(arm.name, {}, nnunet=arm.nnunet, pretrained=arm.pretrained):
            raise UserError(
                f"{where}: stock nnU-Net has no method, no changes, no pretraining and no incomplete series; leave them out"
            )
        if study.finetuned != "all" or study.tested != "all":
            raise UserError(f"{where}: stock nnU-Net is trained and tested on all series; leave out finetuned and tested")
    if arm.mask_volumes:
        if study.task != "classification":
            raise UserError(f"{where}: mask_volumes tell a class; the task is {study.task}, leave the arm out")
        if arm != Arm(arm.name, {}, mask_volumes=arm.mask_volumes):
            raise UserError(f"{where}: a forest of mask volumes sees no series and has no network; leave all else out")
    if arm.encoder and (not arm.pretrained or arm.pretraining_series is not None):
        raise UserError(f"{where}: encoder names weights to start from; leave out pretrained and pretraining_series")
    if "pretraining" in arm.changes and (arm.encoder or not arm.pretrained):
        raise UserError(f"{where}: changes.pretraining does nothing in an arm without a pretraining of its own; leave it out")
    lost = arm.incomplete
    if lost is not None and not lost.remove:
        raise UserError(f"{where}: incomplete is {lost}; expected a share above 0 and up to 1, and numbers of series to remove")


# of a preset: what the pretrained weights depend on; within `network`, the rest belongs to the segmenter
PRETRAINING_KEYS = frozenset(
    {"pretraining", "pretraining_grid", "pretext", "token_edge", "token_size", "patch_size", "max_patch_voxels"}
)
# what the trainer of the one task does not read of a preset
OTHER_TASKS_KEYS = {
    "classification": frozenset(
        {
            "finetuning",
            "frozen_share",
            "stem_closed_share",
            "transferred_blocks",
            "ema",
            "series_dropout",
            "series_dropout_epochs",
            "masked_loss_weight",
        }
    ),
    "segmentation": frozenset({"classification"}),
}
OTHER_TASKS_KEYS["reconstruction"] = frozenset().union(*OTHER_TASKS_KEYS.values())
ENCODER_KEYS = frozenset({"width", "depth", "num_heads", "encoder"})


def pretraining_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an arm's changes that its pretraining depends on: arms that agree in it share their pretrainings."""
    kept = {key: value for key, value in changes.items() if key in PRETRAINING_KEYS}
    network = changes.get("network", {})
    # another kind of encoder may have no segmenter with the preset's decoder
    keys = ENCODER_KEYS | {"decoder"} if "kind" in network.get("encoder", {}) else ENCODER_KEYS
    network = {key: value for key, value in network.items() if key in keys}
    return kept | ({"network": network} if network else {})


def num_labelled(share: float, num_training: int) -> int:
    """Labelled patients of a share; 0.1 of 52 is 5."""
    return max(1, math.floor(share * num_training + 0.5))
