"""Which runs a study has, on whom, with which settings, and what they cost."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import checkpoint_of, csm_plans, masking_of, pretext_of
from nnunet_folders import NUM_TRAINING, TINY_PRESET, PlannedDataset
from studies import AUTOENCODER, CSM, MAE3D, SCRATCH, reconstruction, spec
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.cost import counted, finetuning_cost, pretraining_cost
from nnunet_csm.study.dataset import Dataset, hashed
from nnunet_csm.study.expansion import Expansion, essence
from nnunet_csm.study.runs import CLASSIFIER, PRETRAINER, SEGMENTER, Run, Runs
from nnunet_csm.study.spec import parse_study


def test_arms_that_pretrain_alike_share_their_pretraining_and_no_other(expand: Callable[..., Runs]) -> None:
    faster = {"name": "CSM, faster", "changes": {"finetuning": {"learning_rate": 0.01}, "network": {"drop_path": 0.2}}}
    other = {"name": "half", "changes": {"pretext": {"masking": {"mask_ratio": 0.6}}}}
    runs = expand(arms=[SCRATCH, CSM, faster, other, MAE3D], labels=[1.0, 0.5])
    pretraining = {run.id for run in runs.runs.values() if run.kind == "pretraining"}
    needs = {row.arm: set[str | None]() for row in runs.rows}
    for row in runs.rows:
        needs[row.arm].add(runs.runs[row.run].needs)
    assert needs["CSM"] == needs["CSM, faster"] and len(needs["CSM"]) == 2  # folds
    assert needs["scratch"] == {None}
    assert not needs["CSM"] & needs["half"] and not needs["CSM"] & needs["MAE3D"]
    assert len(pretraining) == 3 * 2
    # arms, shares, folds
    assert len(runs.rows) == len({row.run for row in runs.rows}) == 5 * 2 * 2


def test_an_arm_starts_from_weights_of_elsewhere_unless_they_saw_who_is_tested(
    expand: Callable[..., Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = csm_plans()
    paths = [tmp_path / f"{fold}.pth" for fold in range(2)]
    monkeypatch.setenv("somewhere", str(tmp_path))
    arms = [SCRATCH, {"name": "elsewhere", "encoder": "$somewhere/{division}.pth"}]
    with pytest.raises(UserError, match=f"study s: arm 'elsewhere': {paths[0]}: no such checkpoint"):
        expand(arms=arms)
    saved = checkpoint_of(plans, pretext_of(read_configuration(plans, "3d_fullres", "plans")).state_dict()) | {
        "training_cases": ["Dataset001_Tiny/one"]
    }
    for fold, path in enumerate(paths):
        checkpoint.save({**saved, "fold": fold}, path)
    runs = expand(arms=arms)
    started = {row.division: runs.runs[row.run] for row in runs.rows if row.arm == "elsewhere"}
    assert {fold: run.encoder for fold, run in started.items()} == dict(enumerate(paths))
    assert len(runs.runs) == len(runs.rows) == 4 and not any(run.needs for run in runs.runs.values())
    assert all(
        runs.plans[r.plans_name]["configurations"]["3d_fullres"]["csm"]["finetuning"]["encoder"] == "auto"
        for r in started.values()
    )
    tested = next(iter(started[1].tests[0].channels))
    seen = tmp_path / "seen.pth"
    checkpoint.save({**saved, "training_cases": [f"{started[1].dataset}/{tested}"]}, seen)
    with pytest.raises(UserError, match=f"{seen} learned from images of 1 test cases of division 1"):
        expand(arms=[SCRATCH, {"name": "elsewhere", "encoder": str(seen)}])


def test_folds_of_a_setting_share_plans_and_no_two_settings_do(expand: Callable[..., Runs]) -> None:
    runs = expand(labels=[1.0, 0.5])
    plans: dict[tuple[str, float], set[str]] = defaultdict(set)
    for row in runs.rows:
        plans[row.arm, row.labels].add(runs.runs[row.run].plans_name)
    assert all(len(names) == 1 for names in plans.values())
    assert len(set.union(*plans.values())) == 4


def splits_of(runs: Runs, run: str) -> str:
    plans = runs.plans[runs.runs[run].plans_name]
    return str(plans["configurations"]["3d_fullres"]["csm"]["splits"])


def test_no_run_learns_from_patients_it_is_judged_by(expand: Callable[..., Runs]) -> None:
    runs = expand(arms=[CSM, MAE3D], labels=[1.0, 0.5], repeats={"kind": "folds", "number": 2, "seeds": 3})
    for run in runs.runs.values():
        csm = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]
        sides = runs.splits[csm["splits"]][run.fold]
        images = {*sides["train"], *sides.get("unlabelled", ())}
        assert not images & {*sides["val"], *sides["test"]}
        # of all training patients, however few of them are labelled
        assert run.needs is None or images == set(runs.splits[splits_of(runs, run.needs)][run.fold]["train"])
        assert all(source["labelled"] for source in csm["sources"])  # test images would train in every fold
        for test in run.tests:
            assert set(test.channels) == set(sides["test"])
        if run.needs is not None:
            pretraining = runs.runs[run.needs]
            assert pretraining.fold == run.fold
            seen = runs.splits[runs.plans[pretraining.plans_name]["configurations"]["3d_fullres"]["csm"]["splits"]][run.fold]
            assert set(sides["train"]) <= set(seen["train"]) and seen["test"] == sides["test"]


def test_changes_that_are_no_preset_are_refused_by_the_name_of_the_study(studied: Dataset) -> None:
    studied.study = "mine.json"
    with pytest.raises(UserError, match=r"^study mine\.json: preset demo with its changes.*network is ''"):
        studied.plans("demo", {"network": ""})


def test_images_of_imagests_are_drawn_on_and_never_tested(
    planned_dataset: PlannedDataset, studied: Dataset, tmp_path: Path
) -> None:
    more = Dataset("900", "3d_fullres", tmp_path / "more", test_images=True)
    sources = [source.subset for source in more.settings({**more.plans("demo", {}), "plans_name": "x"}).csm.sources]
    assert sources == ["imagesTr", "imagesTs"] and more.present == studied.present


def test_expanding_twice_names_the_same_runs_and_a_moved_study_too(studied: Dataset, tmp_path: Path) -> None:
    study = parse_study(spec(arms=[SCRATCH, CSM, MAE3D]), "study")
    first = Expansion(study, "s", studied, {}).expand()
    elsewhere = Dataset("900", "3d_fullres", tmp_path / "elsewhere")
    assert list(first.runs) == list(Expansion(study, "s", elsewhere, {}).expand().runs)


@pytest.mark.parametrize(
    ("tested", "expected"), [("all", lambda n: 1), ("one_missing", lambda n: n + 1), ("subsets", lambda n: 2**n - 1)]
)
def test_subsets_of_series_are_tested_by_one_network(
    expand: Callable[..., Runs], studied: Dataset, tested: str, expected: Callable[[int], int]
) -> None:
    runs = expand(arms=[SCRATCH], tested=tested)
    (run, *_) = runs.runs.values()
    num_series = len(studied.series)
    assert len({test.name for test in run.tests}) == len(run.tests) == expected(num_series)
    if tested == "one_missing":
        assert all(test.name == "all" or len(test.name.split("+")) == num_series - 1 for test in run.tests)
    for test in run.tests:
        wanted = set(studied.series) if test.name == "all" else set(test.name.split("+"))
        for case, channels in test.channels.items():
            assert {studied.series[channel] for channel in channels} == wanted & set(studied.present[case])


def test_each_series_alone_is_fine_tuned_from_the_encoder_of_all(expand: Callable[..., Runs], studied: Dataset) -> None:
    runs = expand(arms=[CSM], finetuned="both")
    assert {row.finetuned for row in runs.rows} == {"all", *studied.series}
    assert len({runs.runs[row.run].needs for row in runs.rows}) == 2  # folds
    for row in runs.rows:
        network = runs.plans[runs.runs[row.run].plans_name]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert network["series"] == (list(studied.series) if row.finetuned == "all" else [row.finetuned])


def test_pretraining_on_some_series_only(expand: Callable[..., Runs], studied: Dataset) -> None:
    runs = expand(arms=[{"name": "two", "pretraining_series": 2}, CSM])
    for run in runs.runs.values():
        (source,) = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]["sources"]
        expected = studied.series
        if run.kind == "pretraining" and run.id in {runs.runs[r.run].needs for r in runs.rows if r.arm == "two"}:
            expected = studied.series[:2]
        assert tuple(source["channels"]) == expected


def test_incomplete_series_are_gone_from_labels_and_tests_but_not_from_pretraining(expand: Callable[..., Runs]) -> None:
    arm = {"name": "incomplete", "incomplete": {"share": 1.0, "remove": [1]}}
    complete, incomplete = expand(arms=[CSM]), expand(arms=[arm])
    for one, other in zip(complete.runs.values(), incomplete.runs.values(), strict=True):
        if one.kind == "pretraining":
            assert one == other
            continue
        for case, channels in one.tests[0].channels.items():
            assert len(other.tests[0].channels[case]) == max(1, len(channels) - 1)
        (source,) = incomplete.plans[other.plans_name]["configurations"]["3d_fullres"]["csm"]["sources"]
        assert len(source["absent_series"]) >= NUM_TRAINING - 1


def test_a_search_tries_as_much_for_every_arm_and_takes_the_best_on_validation(expand: Callable[..., Runs]) -> None:
    given = {"search": {"finetuning.learning_rate": [0.1, 0.2, 0.3]}, "arms": [SCRATCH, CSM]}
    searching = expand(**given)
    assert not searching.rows and len(searching.waiting) == 2 * 2
    tried = [run for run in searching.runs.values() if run.kind == "fine-tuning"]
    assert len(tried) == 2 * 2 * 3 and {run.fold for run in tried} == {0, 1}

    def rate(runs: Runs, run: Run) -> float:
        csm = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]
        return float(csm["finetuning_schedule"]["learning_rate"])

    # each division by itself: the validation patients of one are tested in the other
    best = {run.id: (0.3 if run.needs else 0.2) if run.fold == 0 else 0.1 for run in tried}
    records = {run.id: {"validation": 1.0 if rate(searching, run) == best[run.id] else 0.5} for run in tried}
    found = expand(records, **given)
    assert not found.waiting
    chosen = {(row.arm, row.division): rate(found, found.runs[row.run]) for row in found.rows}
    assert chosen == {("scratch", 0): 0.2, ("CSM", 0): 0.3, ("scratch", 1): 0.1, ("CSM", 1): 0.1}
    # what was tried is not trained again
    assert {row.run for row in found.rows} <= set(records)


def test_the_yardstick_gets_the_time_the_arm_took(expand: Callable[..., Runs]) -> None:
    stock = {"plans": "nnUNetPlans", "minutes_of": "CSM"}
    arms = [CSM, *({"name": f"n{both}", "nnunet": {**stock, "with_pretraining": both}} for both in (False, True))]
    first = expand(arms=arms)
    assert len(first.waiting) == 2 and {row.arm for row in first.rows} == {"CSM"}
    records = {run.id: {"seconds": 600.0 if run.kind == "pretraining" else 120.0} for run in first.runs.values()}
    runs = expand(records, arms=arms)
    minutes = {row.arm: runs.plans[runs.runs[row.run].plans_name].get("csm_yardstick", {}).get("minutes") for row in runs.rows}
    assert minutes == {"CSM": None, "nFalse": 2.0, "nTrue": 12.0}


def test_seeds_of_the_yardstick_are_networks_of_their_own(expand: Callable[..., Runs]) -> None:
    given: dict[str, Any] = {
        "arms": [CSM, {"name": "n", "nnunet": {"plans": "nnUNetPlans", "minutes_of": "CSM", "with_pretraining": False}}]
    }
    given |= {"repeats": {"kind": "folds", "number": 2, "seeds": 3}}
    records = {run.id: {"seconds": 60.0} for run in expand(**given).runs.values()}
    rows = [row for row in expand(records, **given).rows if row.arm == "n"]
    assert len({row.run for row in rows}) == len({row.repeat for row in rows}) == len(rows) == 2 * 3
    assert all(row.repeat // 3 == row.division for row in rows)


def test_runs_are_pretrainings_on_one_size_of_patch_scored_on_unseen_cases(expand: Callable[..., Runs]) -> None:
    smaller = {"name": "smaller", "changes": {"pretraining_grid": [2, 2, 2]}}
    runs = expand(**reconstruction(CSM, MAE3D, smaller, AUTOENCODER))
    # arms that differ in the size of patches only are one
    assert {run.kind for run in runs.runs.values()} == {"pretraining"} and len(runs.runs) == 3 * 2 and len(runs.rows) == 4 * 2
    sizes = set()
    for run in runs.runs.values():
        csm = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]
        sizes.add(tuple(csm["pretraining_patch_size"]))
        sides = runs.splits[csm["splits"]][run.fold]
        (test,) = run.tests
        assert set(test.channels) == set(sides["test"]) and not set(sides["test"]) & {*sides["train"], *sides["val"]}
    (size,) = sizes
    token = runs.plans[next(iter(runs.plans))]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["token_size"]
    assert size == tuple(2 * edge for edge in token)


def test_arms_that_cannot_be_compared_are_refused(expand: Callable[..., Runs]) -> None:
    head = {"hidden": 8, "bottleneck": 4, "num_prototypes": 8}
    dino = {"name": "DINO", "changes": {"pretext": {"name": "dino", "head": head}}}
    with pytest.raises(UserError, match="arm 'DINO': dino rebuilds nothing"):
        expand(**reconstruction(CSM, dino))
    with pytest.raises(UserError, match="different series"):
        expand(**reconstruction(CSM, {"name": "one", "pretraining_series": 1}))


def test_what_would_stop_runs_hours_later_is_told_at_once(expand: Callable[..., Runs]) -> None:
    stock = {"plans": "nnUNetResEncUNetMPlans", "minutes_of": "CSM", "with_pretraining": False}
    with pytest.raises(UserError, match="nnUNetResEncUNetMPlans"):
        expand(arms=[CSM, {"name": "n", "nnunet": stock}])
    with pytest.raises(UserError, match=r"classification\.csv"):
        expand(task="classification")
    with pytest.raises(UserError, match="leave the arm out"):
        expand(arms=[{"name": "many", "pretraining_series": 9}])


def test_what_only_people_read_makes_no_other_run(studied: Dataset) -> None:
    plans = studied.plans(str(TINY_PRESET), {})
    other = json.loads(json.dumps(plans))
    csm = other["configurations"]["3d_fullres"]["csm"]
    csm["preset"], csm["reasons"] = "x", {}
    assert essence(plans, SEGMENTER) == essence(other, SEGMENTER) and hashed(plans) != hashed(other)
    # a classifier's settings make no other segmenter
    csm["classification"]["mask_features"] ^= True
    alike = {trainer for trainer in (PRETRAINER, SEGMENTER, CLASSIFIER) if essence(plans, trainer) == essence(other, trainer)}
    assert alike == {PRETRAINER, SEGMENTER}
    csm["pretext"]["masking"]["mask_ratio"] = 0.123
    assert essence(plans, SEGMENTER) != essence(other, SEGMENTER)


def test_stock_nnunet_is_given_what_it_was_trained_with(expand: Callable[..., Runs], studied: Dataset) -> None:
    given = {"arms": [CSM, {"name": "n", "nnunet": {"plans": "nnUNetPlans", "minutes_of": "CSM", "with_pretraining": False}}]}
    runs = expand({run.id: {"seconds": 60.0} for run in expand(**given).runs.values()}, **given)
    assert any(len(names) < len(studied.series) for names in studied.present.values())
    for row in runs.rows:
        (test,) = runs.runs[row.run].tests
        for case, channels in test.channels.items():
            assert len(channels) == (len(studied.series) if row.arm == "n" else len(studied.present[case]))


def test_visible_tokens_are_those_masks_show(expand: Callable[..., Runs], studied: Dataset) -> None:
    runs = expand(arms=[CSM, {"name": "none", "changes": {"pretext": {"masking": {"hidden_series": "none"}}}}, MAE3D])
    visible = {row.arm: runs.runs[runs.runs[row.run].needs or ""].visible_tokens for row in runs.rows}
    mean_present = np.mean([len(names) for names in studied.present.values()])
    settings = studied.settings(next(iter(runs.plans.values())))
    shown = round((1 - masking_of(settings).mask_ratio) * np.prod(settings.pretraining_grid))
    assert visible["none"] == pytest.approx(mean_present * shown)
    assert visible["CSM"] < visible["none"]
    assert visible["MAE3D"] == round(0.25 * np.prod(settings.pretraining_grid))


def test_costs_grow_with_what_is_computed(expand: Callable[..., Runs], studied: Dataset) -> None:
    runs = expand(arms=[CSM])
    of = {run.kind: studied.settings(runs.plans[run.plans_name]) for run in runs.runs.values()}
    # with more series in a case, more tokens are visible, and more are rebuilt
    few, many = (pretraining_cost(of["pretraining"], torch.ones(4, 3).tril(n) > 0).operations_per_crop for n in (0, 2))
    assert 0 < few < many
    finetuning = finetuning_cost(of["fine-tuning"], len(studied.series), 4, classifies=False)
    assert finetuning.num_crops == of["fine-tuning"].csm.finetuning_schedule.num_iterations * 2
    assert finetuning.seconds(2e9) == pytest.approx(finetuning.seconds(1e9) / 2)


def test_attention_is_counted() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 3, 5, 8, requires_grad=True)
        # two products of 5 x 5 x 8 for each of 6 heads, and two for each of them backward
        assert counted(AttentionOnly(), query) == 3 * 2 * (2 * 5 * 5 * 8) * 6


class AttentionOnly(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)
