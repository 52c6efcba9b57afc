"""`nnunet_csm plan`, `preprocess`: read nnU-Net's files of the datasets, plan, print, write; make what the plans need."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm import nnunet
from nnunet_csm.data.sources import case_names
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.command import findings, take_fingerprint
from nnunet_csm.fingerprint.record import ALL_ZERO, Fingerprint, Subset, absent_series, num_with_series
from nnunet_csm.planning.joint import Member, joint_base_plans
from nnunet_csm.planning.planner import Decision, Facts, Wishes, base_configuration, plan
from nnunet_csm.planning.unlabelled import image_files, plan_without_labels, preprocess_images
from nnunet_csm.plans import Source, read_configuration
from nnunet_csm.raw.check import check_dataset, has_labels, load_dataset_json
from nnunet_csm.raw.series import SeriesMatch, canonical_series, parse_aliases


@dataclass(frozen=True)
class PlanRequest:
    """What `nnunet_csm plan` was asked for, beside the sizes."""

    configuration: str
    base_plans_name: str
    plans_name: str
    aliases: tuple[str, ...] = ()
    joint: bool = False
    test_images: bool = False
    target_spacing: tuple[float, float, float] | None = None
    num_processes: int = 1
    strict: bool = False


@dataclass(frozen=True)
class Found:
    """What is known of one dataset before planning."""

    name: str
    dataset_json: Mapping[str, Any]
    base_plans: Mapping[str, Any]
    channels: dict[str, int]
    labelled: bool
    fingerprint: Fingerprint | None

    @property
    def folder(self) -> Path:
        return nnunet.folder("nnUNet_preprocessed") / self.name


def plan_datasets(datasets: Sequence[str], request: PlanRequest, wishes: Wishes) -> None:
    """Write `<plans_name>.json` beside nnU-Net's plans of every dataset and print every decision with its reason."""
    if request.plans_name == request.base_plans_name:
        raise UserError(f"{request.plans_name}.json holds nnU-Net's plans, which are kept; give another -overwrite_plans_name")
    if request.joint and len(datasets) < 2:
        raise UserError("--joint plans for several datasets at once; give at least two with -d, the one to fine-tune on first")
    found = [look_at(dataset, request) for dataset in datasets]
    if request.joint:
        plan_jointly(found, request, wishes)
        return
    for one in found:
        facts = facts_of(one, request, sources_of(one, request, None), one.base_plans)
        base = with_data_identifier(one, request)
        write(one, request, *plan(base, request.configuration, facts, request.plans_name, wishes))


def look_at(dataset: str, request: PlanRequest) -> Found:
    """Read nnU-Net's files and take the fingerprint; a dataset without labels gets nnU-Net's plans from it."""
    name = nnunet.dataset_name(dataset)
    folder, raw = nnunet.folder("nnUNet_preprocessed") / name, nnunet.folder("nnUNet_raw") / name
    remedy = f"run nnUNetv2_plan_and_preprocess -d {dataset} -c {request.configuration} first"
    there = (raw / "dataset.json").is_file()
    dataset_json = load_dataset_json(raw) if there else nnunet.read_json(folder / "dataset.json", remedy)
    matches = canonical_series(nnunet.channel_names(dataset_json), parse_aliases(request.aliases))
    print_series(name, matches)
    channels = {match.canonical: channel for channel, match in enumerate(matches)}
    fingerprint = None
    if there:
        fingerprint = take_fingerprint(
            name, dataset_json, tuple(channels), request.test_images, request.num_processes, request.strict
        )
        print("\n".join(findings(fingerprint)))
    else:
        print(f"{raw}: not there, so that series are taken to be complete; a fingerprint needs the raw images")
    labelled = not there or has_labels(dataset_json)
    if not labelled:
        assert fingerprint is not None
        plan_without_labels(name, dataset_json, fingerprint)
        print(f"{raw}: no labels; nnU-Net's plans were made from the images alone")
    base_plans = nnunet.read_json(folder / f"{request.base_plans_name}.json", remedy)
    dataset_json = nnunet.read_json(folder / "dataset.json", remedy)
    return Found(name, dataset_json, base_plans, channels, labelled, fingerprint)


def print_series(dataset: str, matches: Sequence[SeriesMatch]) -> None:
    for match in matches:
        note = "" if match.known else "  (unknown name, kept; say what it is with -series_alias)"
        print(f"{dataset}: series {match.given} -> {match.canonical}{note}")


def with_data_identifier(one: Found, request: PlanRequest) -> dict[str, Any]:
    """nnU-Net's plans, with the folder that images without labels are preprocessed into."""
    if one.labelled:
        return dict(one.base_plans)
    entry = base_configuration(one.base_plans, request.configuration, one.name)
    entry["data_identifier"] = own_identifier(one, entry["data_identifier"])
    return {**one.base_plans, "configurations": {request.configuration: entry}}


def own_identifier(one: Found, identifier: str) -> str:
    return identifier if one.labelled else f"{identifier}_unlabelled"


def sources_of(one: Found, request: PlanRequest, data_identifier: str | None) -> tuple[Source, ...]:
    """The images of a dataset that pretraining may draw on."""
    if data_identifier is None:
        entry = base_configuration(one.base_plans, request.configuration, f"{request.base_plans_name} of {one.name}")
        data_identifier = entry["data_identifier"]
    own = Source(
        dataset=one.name,
        subset="imagesTr",
        labelled=one.labelled,
        data_identifier=own_identifier(one, data_identifier),
        num_channels=len(one.channels),
        channels=one.channels,
        absent_series=copies(one, "imagesTr"),
    )
    if not request.test_images:
        return (own,)
    test = replace(
        own,
        subset="imagesTs",
        labelled=False,
        data_identifier=f"{data_identifier}_imagesTs",
        absent_series=copies(one, "imagesTs"),
    )
    return own, test


def copies(one: Found, subset: Subset) -> dict[str, tuple[str, ...]]:
    """Case to the series that are absent although their voxels are not zero; zeros are still zeros after preprocessing."""
    if one.fingerprint is None:
        return {}
    absent = {}
    for case, names in absent_series(one.fingerprint, subset).items():
        records = one.fingerprint.cases[case].series
        filled = tuple(name for name in names if records[name].absent != ALL_ZERO)
        if filled:
            absent[case] = filled
    return absent


def facts_of(one: Found, request: PlanRequest, sources: Sequence[Source], base_plans: Mapping[str, Any]) -> Facts:
    """The fingerprint as the planner wants it; without raw images, every case counts as complete."""
    labels = PlansManager(dict(base_plans)).get_label_manager(dict(one.dataset_json))
    num_test = (
        len(image_files(nnunet.folder("nnUNet_raw") / one.name, "imagesTs", one.dataset_json)) if request.test_images else 0
    )
    fingerprint = one.fingerprint
    if fingerprint is None:
        num_cases = one.dataset_json.get("numTraining") or len(list((one.folder / "gt_segmentations").iterdir()))
        counts, present = dict.fromkeys(one.channels, num_cases), {len(one.channels): num_cases}
    else:
        training = [case for case in fingerprint.cases.values() if case.subset == "imagesTr"]
        num_cases, counts = len(training), num_with_series(fingerprint)
        present = dict(Counter(sum(r.absent is None for r in case.series.values()) for case in training))
    return Facts(
        channels=one.channels,
        num_cases=num_cases,
        num_classes=labels.num_segmentation_heads,
        num_with_series=counts,
        num_present=present,
        sources=tuple(sources),
        num_pretraining_cases=num_cases + num_test,
    )


def plan_jointly(found: Sequence[Found], request: PlanRequest, wishes: Wishes) -> None:
    """One plan for all, decided for the first dataset with the series of all of them, written for each."""
    members = [
        Member(one.base_plans, nnunet.read_json(one.folder / "dataset_fingerprint.json", "plan with nnU-Net first"), one.channels)
        for one in found
    ]
    bases, shared = joint_base_plans(members, request.configuration, request.plans_name, request.target_spacing)
    identifier = f"{request.plans_name}_{request.configuration}"
    sources = [source for one in found for source in sources_of(one, request, identifier)]
    all_facts = [facts_of(one, request, sources, base) for one, base in zip(found, bases, strict=True)]
    total = sum(facts.num_pretraining_cases for facts in all_facts)
    most_classes = max(facts.num_classes for facts in all_facts)
    owner = found[0].name
    for one, base, facts in zip(found, bases, all_facts, strict=True):
        base["configurations"][request.configuration]["data_identifier"] = own_identifier(one, identifier)
        facts = replace(facts, num_pretraining_cases=total, num_classes=most_classes)
        mine = wishes
        if wishes.series is not None:
            mine = replace(wishes, series=tuple(name for name in wishes.series if name in one.channels))
            if not mine.series:
                raise UserError(f"-series {' '.join(wishes.series)}: {one.name} has only {', '.join(one.channels)}")
        plans, decisions = plan(base, request.configuration, facts, request.plans_name, mine)
        decisions = [*shared, *decisions]
        plans["configurations"][request.configuration]["csm"]["reasons"] |= {d.name: [d.value, d.reason] for d in shared}
        write(one, request, plans, decisions)
        if one is found[0]:
            settings = read_configuration(plans, request.configuration, one.name)
            wishes = replace(
                wishes,
                preset=settings.csm.preset,
                patch_size=settings.patch_size,
                token_size=settings.architecture.token_size,
                why=f"joint plan of {owner}",
            )


def write(one: Found, request: PlanRequest, plans: dict[str, Any], decisions: Sequence[Decision]) -> None:
    """Save plans beside nnU-Net's, keeping earlier configurations of ours, and print the table."""
    configuration, path = request.configuration, one.folder / f"{request.plans_name}.json"
    earlier = nnunet.read_json(path, "remove it").get("configurations", {}) if path.is_file() else {}
    if earlier and not any("csm" in entry for entry in earlier.values()):
        raise UserError(f"{path}: holds plans that are not ours and are kept; give another -overwrite_plans_name")
    if configuration in earlier and earlier[configuration] != plans["configurations"][configuration]:
        print(f"replacing other plans for {configuration} in {path}; networks trained with them need their old plans to go on")
    plans["configurations"] = {**earlier, **plans["configurations"]}
    nnunet.save_json(plans, path)
    print(f"\n{one.name}\n{as_table(decisions)}\n\nwritten to {path}")
    missing = [s for s in read_configuration(plans, configuration, str(path)).csm.sources if not is_preprocessed(s)]
    if missing:
        ids = " ".join(dict.fromkeys(s.dataset for s in missing))
        print(f"not preprocessed yet: nnunet_csm preprocess -d {ids} -c {configuration} -p {request.plans_name}")


def is_preprocessed(source: Source) -> bool:
    try:
        return bool(case_names(source, nnunet.folder("nnUNet_preprocessed")))
    except UserError:
        return False


def preprocess_datasets(
    datasets: Sequence[str], configuration: str, plans_name: str, num_processes: int, overwrite: bool
) -> None:
    """Make the preprocessed images that CSM plans name and that are not there: labelled ones by nnU-Net, others as it would.

    Raises:
        UserError: no such plans, or images that cannot be used.
    """
    for dataset in datasets:
        name = nnunet.dataset_name(dataset)
        folder, raw = nnunet.folder("nnUNet_preprocessed") / name, nnunet.folder("nnUNet_raw") / name
        path = folder / f"{plans_name}.json"
        plans = nnunet.read_json(path, f"plan with `nnunet_csm plan -d {dataset}`")
        settings = read_configuration(plans, configuration, str(path))
        dataset_json = nnunet.read_json(folder / "dataset.json", f"plan with `nnunet_csm plan -d {dataset}`")
        for source in settings.csm.sources:
            output = folder / source.data_identifier
            if source.dataset != name:
                continue
            if not source.labelled:
                num_done = preprocess_images(raw, source.subset, dataset_json, plans, configuration, output, num_processes)
                print(f"{output}: {num_done} cases preprocessed, the others were there")
            elif overwrite or not is_preprocessed(source):
                preprocess_labelled(name, configuration, plans_name, output, num_processes)
            else:
                print(f"{output}: already there")


def preprocess_labelled(dataset: str, configuration: str, plans_name: str, output: Path, num_processes: int) -> None:
    """nnU-Net's preprocessing; an interrupted one leaves no folder that looks complete."""
    try:
        preprocess_dataset(nnunet.dataset_id(dataset), plans_name, (configuration,), (num_processes,))
    except BaseException:
        for file in output.glob("*.b2nd"):
            file.unlink()
        raise


def check_raw(dataset: str) -> bool:
    """Look at the headers of all raw files before hours of preprocessing.

    Returns:
        Whether the dataset has labels.
    """
    name = nnunet.dataset_name(dataset)
    folder = nnunet.folder("nnUNet_raw") / name
    dataset_json = load_dataset_json(folder)
    for line in check_dataset(folder, dataset_json):
        print(line)
    return has_labels(dataset_json)


def check_plans(datasets: Sequence[str], plans_name: str, configuration: str) -> str:
    """The dataset that owns a training run.

    Raises:
        UserError: no plans, or plans that draw on other datasets than those named.
    """
    names = [nnunet.dataset_name(dataset) for dataset in datasets]
    path = nnunet.folder("nnUNet_preprocessed") / names[0] / f"{plans_name}.json"
    ids = " ".join(datasets)
    remedy = f"plan with `nnunet_csm plan_and_preprocess -d {ids}{' --joint' if len(names) > 1 else ''}`"
    plans = nnunet.read_json(path, remedy)
    if len(names) > 1:
        sources = read_configuration(plans, configuration, str(path)).csm.sources
        drawn_on = list(dict.fromkeys(source.dataset for source in sources))
        if drawn_on[0] != names[0] or set(drawn_on) != set(names):
            raise UserError(
                f"{path}: made for {', '.join(drawn_on)}, the first of which owns the run, not for -d {ids}; {remedy}"
            )
    return names[0]


def as_table(decisions: Sequence[Decision]) -> str:
    """decision | value | reason, aligned."""
    rows = [("decision", "value", "reason"), *((d.name, d.value, d.reason) for d in decisions)]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)
