"""`nnunet_csm plan`: read nnU-Net's files of the datasets, plan, print, write."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm import nnunet
from nnunet_csm.data.sources import too_few_cases
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.command import findings, take_fingerprint
from nnunet_csm.fingerprint.record import ALL_ZERO, Fingerprint, Subset, absent_series, num_with_series
from nnunet_csm.planning.classification import SHARE_AT_ONE_SCALE, extent_to_hold, mask_extents, take_class_table
from nnunet_csm.planning.facts import Decision, Facts, Wishes
from nnunet_csm.planning.joint import Member, joint_base_plans
from nnunet_csm.planning.planner import base_configuration, plan
from nnunet_csm.planning.preprocessing import is_preprocessed
from nnunet_csm.planning.request import PlanRequest, check_request, described, series_of
from nnunet_csm.planning.unlabelled import image_files, plan_without_labels
from nnunet_csm.plans import SPLITS, STOCK_PLANS_NAME, Configuration, Source, read_configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.pretext.cost import CPU_PRESET, EXTREMES, device_name, training_cost
from nnunet_csm.raw.check import has_labels
from nnunet_csm.raw.series import SeriesMatch


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

    @property
    def num_cases(self) -> int:
        """Training cases."""
        if self.fingerprint is not None:
            return sum(case.subset == "imagesTr" for case in self.fingerprint.cases.values())
        return self.dataset_json.get("numTraining") or len(list((self.folder / "gt_segmentations").iterdir()))


def plan_datasets(datasets: Sequence[str], request: PlanRequest, wishes: Wishes) -> list[str]:
    """Write `<plans_name>.json` beside nnU-Net's plans of every dataset and print every decision with its reason.

    Nothing is written for any of them unless all can be planned. Returns lines about images that are to be preprocessed.
    """
    names = check_request(datasets, request, wishes)
    wishes = replace(wishes, device="cuda" if torch.cuda.is_available() else "cpu")
    found = [look_at(name, names, request) for name in names]
    results = list(planned_jointly(found, request, wishes) if request.joint else planned(found, request, wishes))
    # joint plans have the same images
    return list(dict.fromkeys(line for one, plans, decisions in results for line in write(one, request, plans, decisions)))


Planned = tuple["Found", dict[str, Any], list[Decision]]


def planned(found: Sequence[Found], request: PlanRequest, wishes: Wishes) -> Iterator[Planned]:
    """Plans of each dataset by itself."""
    for one in found:
        entry = base_configuration(one.base_plans, request.configuration, f"{request.base_plans_name} of {one.name}")
        sources = restricted(sources_of(one, request, entry["data_identifier"]), wishes.series)
        entry["data_identifier"] = sources[0].data_identifier
        base = {**one.base_plans, "configurations": {request.configuration: entry}}
        note = f"that of {request.base_plans_name}, as it is" if one.labelled else "preprocessed without labels"
        facts = replace(facts_of(one, request, sources, one.base_plans), data_note=note)
        yield one, *plan(base, request.configuration, facts, request.plans_name, wishes)


def look_at(name: str, names: Sequence[str], request: PlanRequest) -> Found:
    """Read nnU-Net's files and take the fingerprint; a dataset without labels gets nnU-Net's plans from it."""
    folder, raw = nnunet.folder("nnUNet_preprocessed") / name, nnunet.folder("nnUNet_raw") / name
    dataset_json, is_raw = described(name)
    labelled = not is_raw or has_labels(dataset_json)
    path = folder / f"{request.base_plans_name}.json"
    remedy = f"run nnUNetv2_plan_and_preprocess -d {nnunet.dataset_id(name)} -c {request.configuration} first"
    if there := sorted(file.stem for file in folder.glob("nnUNet*Plans.json") if '"csm"' not in file.read_text(errors="replace")):
        remedy = f"{' or '.join(f'-p {plans_name}' for plans_name in there)} builds on what is there; else {remedy}"
    if labelled:
        nnunet.read_plans(path, remedy)  # before all images are read
    elif request.base_plans_name != STOCK_PLANS_NAME:
        raise UserError(f"{name}: has no labels, and is planned for by nnU-Net's default planner only; leave out -p")
    matches = series_of(name, names, request)
    print_series(name, matches)
    channels = {match.canonical: channel for channel, match in enumerate(matches)}
    fingerprint = None
    if is_raw:
        fingerprint = take_fingerprint(
            name, dataset_json, tuple(channels), request.test_images, request.num_processes, request.strict
        )
        print("\n".join(findings(fingerprint)))
    else:
        print(f"{raw}: not there, so that series are taken to be complete; a fingerprint needs the raw images")
    if not labelled:
        assert fingerprint is not None
        plan_without_labels(name, dataset_json, fingerprint)
        print(f"{raw}: no labels; {path} was made from the images alone")
    dataset_json, plans = nnunet.read_dataset_json(folder / "dataset.json", remedy), nnunet.read_plans(path, remedy)
    return Found(name, dataset_json, plans, channels, labelled, fingerprint)


def print_series(dataset: str, matches: Sequence[SeriesMatch]) -> None:
    for match in matches:
        note = "" if match.known else "  (unknown name, kept; say what it is with -series_alias)"
        print(f"{dataset}: series {match.given} -> {match.canonical}{note}")


def own_identifier(one: Found, identifier: str) -> str:
    return identifier if one.labelled else f"{identifier}_unlabelled"


def sources_of(one: Found, request: PlanRequest, data_identifier: str) -> tuple[Source, ...]:
    """The images of a dataset that pretraining may draw on."""
    own = Source(
        dataset=one.name,
        subset="imagesTr",
        labelled=one.labelled,
        data_identifier=own_identifier(one, data_identifier),
        num_channels=len(one.channels),
        channels=one.channels,
        absent_series=filled_in(one, "imagesTr"),
    )
    if not request.test_images:
        return (own,)
    test = replace(
        own,
        subset="imagesTs",
        labelled=False,
        data_identifier=f"{data_identifier}_imagesTs",
        absent_series=filled_in(one, "imagesTs"),
    )
    return own, test


def restricted(sources: Iterable[Source], series: Sequence[str] | None) -> tuple[Source, ...]:
    """The sources with the chosen series only.

    Raises:
        UserError: a source that has none of them.
    """
    if series is None:
        return tuple(sources)
    chosen = []
    for source in sources:
        channels = {name: channel for name, channel in source.channels.items() if name in series}
        if not channels:
            raise UserError(
                f"-series {' '.join(series)}: {source.dataset} has only {', '.join(source.channels)}; leave it out of -d"
            )
        chosen.append(replace(source, channels=channels))
    return tuple(chosen)


def filled_in(one: Found, subset: Subset) -> dict[str, tuple[str, ...]]:
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
    raw, table = nnunet.folder("nnUNet_raw") / one.name, take_class_table(one.name, one.dataset_json)
    measured = mask_extents(raw, one.dataset_json, table) if table is not None and raw.is_dir() else {}
    num_test = (
        len(image_files(nnunet.folder("nnUNet_raw") / one.name, "imagesTs", one.dataset_json)) if request.test_images else 0
    )
    fingerprint = one.fingerprint
    if fingerprint is None:
        counts, present = dict.fromkeys(one.channels, one.num_cases), {len(one.channels): one.num_cases}
    else:
        training = [case for case in fingerprint.cases.values() if case.subset == "imagesTr"]
        counts = num_with_series(fingerprint)
        seen = {series for source in sources if source.dataset == one.name for series in source.channels}
        present = dict(Counter(sum(r.absent is None for n, r in case.series.items() if n in seen) for case in training))
    return Facts(
        channels=one.channels,
        num_cases=one.num_cases,
        num_classes=labels.num_segmentation_heads,
        num_with_series=counts,
        num_present=present,
        sources=tuple(sources),
        num_pretraining_cases=one.num_cases + num_test,
        num_samples=len(table.samples) if table is not None else 0,
        classes=table.classes if table is not None else (),
        mask_extent_mm=extent_to_hold(measured.values(), base_plans),
        large_mask_mm=extent_to_hold(measured.values(), base_plans, SHARE_AT_ONE_SCALE),
    )


def planned_jointly(found: Sequence[Found], request: PlanRequest, wishes: Wishes) -> Iterator[Planned]:
    """One plan for all, decided for the first dataset with the series of all of them."""
    members = [
        Member(one.base_plans, nnunet.read_json(one.folder / "dataset_fingerprint.json", "plan with nnU-Net first"), one.channels)
        for one in found
    ]
    bases, shared = joint_base_plans(members, request.configuration, request.plans_name, request.target_spacing)
    identifier = bases[0]["configurations"][request.configuration]["data_identifier"]
    weighed = zip(found, request.weights or [1.0] * len(found), strict=True)
    drawn_on = (replace(s, weight=weight) for one, weight in weighed for s in sources_of(one, request, identifier))
    sources = restricted(drawn_on, wishes.series)
    all_facts = [facts_of(one, request, sources, base) for one, base in zip(found, bases, strict=True)]
    total = sum(facts.num_pretraining_cases for facts in all_facts)
    most_classes = max(facts.num_classes for facts in all_facts)
    for one, base, facts in zip(found, bases, all_facts, strict=True):
        base["configurations"][request.configuration]["data_identifier"] = own_identifier(one, identifier)
        note = "of these plans and all their datasets; made for them anew"
        facts = replace(facts, num_pretraining_cases=total, num_classes=most_classes, data_note=note)
        own = None if wishes.series is None else tuple(name for name in wishes.series if name in one.channels)
        plans, decisions = plan(base, request.configuration, facts, request.plans_name, replace(wishes, series=own))
        plans["configurations"][request.configuration]["csm"]["reasons"] |= {d.name: [d.value, d.reason] for d in shared}
        yield one, plans, [*shared, *decisions]
        if one is found[0]:
            settings = read_configuration(plans, request.configuration, one.name)
            wishes = replace(
                wishes,
                preset=settings.csm.preset,
                patch_size=settings.patch_size,
                token_size=settings.architecture.token_size,
                why=f"joint plan of {one.name}",
            )


def write(one: Found, request: PlanRequest, plans: dict[str, Any], decisions: Sequence[Decision]) -> list[str]:
    """Save plans beside nnU-Net's, keeping earlier configurations of ours, and print the table; returns as `plan_datasets`."""
    configuration, path = request.configuration, one.folder / f"{request.plans_name}.json"
    earlier = nnunet.read_plans(path, "move it away")["configurations"] if path.is_file() else {}
    if earlier and not any("csm" in entry for entry in earlier.values()):
        raise UserError(f"{path}: holds plans that are not ours and are kept; give another -overwrite_plans_name")
    if configuration in earlier and earlier[configuration] != plans["configurations"][configuration]:
        print(f"replacing other plans for {configuration} in {path}; {trained_by(one.name, request)}")
        if images_of(earlier[configuration]) - images_of(plans["configurations"][configuration]) == {(one.name, "imagesTs")}:
            print(f"those drew on {one.name}/imagesTs in pretraining, these do not; give --test_images for that")
    plans["configurations"] = {**earlier, **plans["configurations"]}
    nnunet.save_json(plans, path)
    print(f"\n{one.name}\n{as_table(decisions)}\n\nwritten to {path}")
    settings = read_configuration(plans, configuration, str(path))
    print(time_told(one, settings))
    if one.num_cases < nnunet.NUM_FOLDS and not (one.folder / SPLITS).is_file():
        print(f"WARNING: {too_few_cases(one.folder, one.num_cases)}")
    missing = [s for s in settings.csm.sources if not is_preprocessed(s, plans, configuration)]
    if not missing:
        return []
    ids = " ".join(dict.fromkeys(s.dataset for s in missing))
    flags = f"-d {ids} -c {configuration} -preprocess_only {request.plans_name}"
    return [f"not preprocessed yet: nnunet_csm plan_and_preprocess {flags}"]


def images_of(entry: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Dataset and folder of the images that a configuration of plans pretrains on."""
    return {(source["dataset"], source["subset"]) for source in entry.get("csm", {}).get("sources", ())}


def time_told(one: Found, settings: Configuration) -> str:
    """How long both trainings take on this machine, and what to do where that is too long."""
    csm, times = settings.csm, []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for stage, schedule, is_one in (
        ("pretraining", csm.pretraining, setup_of(settings)[0].learns),
        ("fine-tuning", csm.finetuning_schedule, one.labelled),
    ):
        if is_one:
            times.append(f"{stage} {training_cost(settings, schedule, len(one.dataset_json['labels'])).time_on(device)}")
    told = (
        f"expected on {device_name(device)}: {', '.join(times)} (operations counted, at {EXTREMES[1]:.0%} to {EXTREMES[0]:.0%} "
        f"of the speed of a large matrix product; reading and validation come on top)"
    )
    if device.type == "cuda":
        return told
    told += "\nno CUDA device was found: train with -device cpu"
    if csm.preset == CPU_PRESET:
        return told
    return f"{told}; where that takes too long, `nnunet_csm plan -preset {CPU_PRESET}` makes plans for CPU cores"


def trained_by(dataset: str, request: PlanRequest) -> str:
    """What becomes of networks that were trained by plans of this name."""
    folder = nnunet.folder("nnUNet_results") / dataset if "nnUNet_results" in os.environ else None
    trained = folder.glob(f"*__{request.plans_name}__{request.configuration}/fold_*/checkpoint_*.pth") if folder else ()
    folds = sorted({f"{file.parents[1].name.split('__')[0]} {file.parent.name}" for file in trained})
    if not folds:
        return "nothing was trained by them"
    return (
        f"trained by them: {', '.join(folds)}. These predict as before, but go on only by their old plans, and no fine-tuning by "
        f"the new ones starts from an encoder of another recipe by itself; -overwrite_plans_name keeps both"
    )


def as_table(decisions: Sequence[Decision]) -> str:
    """decision | value | reason, aligned."""
    rows = [("decision", "value", "reason"), *((d.name, d.value, d.reason) for d in decisions)]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)
