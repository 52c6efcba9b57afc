"""`nnunet_csm plan`: read nnU-Net's files of a dataset, plan, print, write."""

from collections.abc import Sequence

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.planning.planner import Decision, plan, save_plans
from nnunet_csm.plans import Size
from nnunet_csm.raw.check import check_dataset
from nnunet_csm.raw.series import canonical_series, parse_aliases


def plan_dataset(
    dataset: str,
    configuration: str,
    base_plans_name: str,
    plans_name: str,
    preset: str,
    aliases: Sequence[str],
    patch_size: Size | None,
    token_size: Size | None,
) -> None:
    """Write `<plans_name>.json` beside nnU-Net's plans and print every decision with its reason."""
    name = nnunet.dataset_name(dataset)
    folder = nnunet.folder("nnUNet_preprocessed") / name
    if plans_name == base_plans_name:
        raise UserError(
            f"{folder / plans_name}.json: these are nnU-Net's plans, kept as they are; give another -overwrite_plans_name"
        )
    remedy = f"run nnUNetv2_plan_and_preprocess -d {dataset} -c {configuration} first"
    base_plans = nnunet.read_json(folder / f"{base_plans_name}.json", remedy)
    dataset_json = nnunet.read_json(folder / "dataset.json", remedy)
    matches = canonical_series(nnunet.channel_names(dataset_json), parse_aliases(aliases))
    for match in matches:
        note = "" if match.known else "  (unknown name, kept; say what it is with -series_alias)"
        print(f"series {match.given} -> {match.canonical}{note}")
    plans, decisions = plan(
        base_plans,
        configuration,
        [match.canonical for match in matches],
        dataset_json.get("numTraining") or len(list((folder / "gt_segmentations").iterdir())),
        preset,
        plans_name,
        patch_size,
        token_size,
    )
    path = folder / f"{plans_name}.json"
    earlier = nnunet.read_json(path, "remove it").get("configurations", {}) if path.is_file() else {}
    if earlier and not any("csm" in entry for entry in earlier.values()):
        raise UserError(f"{path}: holds plans that are not ours and are kept; give another -overwrite_plans_name")
    if configuration in earlier and earlier[configuration] != plans["configurations"][configuration]:
        print(f"replacing other plans for {configuration} in {path}; networks trained with them need their old plans to go on")
    plans["configurations"] = {**earlier, **plans["configurations"]}
    save_plans(plans, path)
    print(f"\n{as_table(decisions)}\n\nwritten to {path}")
    data = folder / plans["configurations"][configuration]["data_identifier"]
    if not data.is_dir():
        print(f"{data} is not there yet: nnUNetv2_preprocess -d {dataset} -plans_name {base_plans_name} -c {configuration}")


def check_raw(dataset: str) -> None:
    """Look at the headers of all raw files before hours of preprocessing."""
    folder = nnunet.folder("nnUNet_raw") / nnunet.dataset_name(dataset)
    for line in check_dataset(folder):
        print(line)


def as_table(decisions: Sequence[Decision]) -> str:
    """decision | value | reason, aligned."""
    rows = [("decision", "value", "reason"), *((d.name, d.value, d.reason) for d in decisions)]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)
