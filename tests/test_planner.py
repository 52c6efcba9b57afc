"""Plans fit the data, the budget and nnU-Net, whatever the dataset; every decision has its reason."""

import copy
import json
import math

import pytest
from factories import SERIES, GuessedMemory, base_plans, facts_of, masking_of, source_of
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import encoder_class
from nnunet_csm.nnunet import save_json
from nnunet_csm.planning.command import restricted
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.planning.presets import merged, paper_preset, preset_names, read_preset
from nnunet_csm.planning.schedules import num_crops
from nnunet_csm.planning.sizes import MAX_TOKENS, MIN_PLACES_PER_AXIS, MIN_TOKENS_PER_AXIS
from nnunet_csm.plans import NETWORK_CLASS, read_configuration
from nnunet_csm.pretext.masking import num_visible

BT_MSD = ("FLAIR", "T1w", "T1ce", "T2w")

# name: median shape, spacing in mm, number of series
DATASETS = {
    "isotropic": ((138, 170, 138), (1.0, 1.0, 1.0), 4),
    "thick slices": ((20, 320, 320), (3.6, 0.625, 0.625), 3),
    "thick along the last axis": ((320, 320, 24), (0.5, 0.5, 4.0), 2),
    "five slices": ((5, 256, 256), (8.0, 1.0, 1.0), 2),
    "one slice": ((1, 256, 256), (8.0, 1.0, 1.0), 2),
    "tiny volume": ((18, 14, 12), (1.0, 1.0, 1.0), 3),
    "one series": ((130, 320, 260), (1.0, 1.4, 1.4), 1),
    "seven series": ((60, 200, 180), (1.5, 1.0, 1.0), 7),
    "large, as CT": ((480, 512, 512), (0.8, 0.75, 0.75), 1),
    "long and thin": ((1200, 40, 40), (1.0, 1.0, 1.0), 2),
    "odd lengths": ((137.5, 169.0, 33.0), (1.1, 0.9, 2.0), 4),
}

# presets that leave the sizes to the planner
PLANNED = [name for name in preset_names() if (preset := read_preset(name)).patch_size is None and preset.token_size is None]


def names(s):
    return [f"series {n}" for n in range(s)]


def planned(
    shape=(120, 160, 140), spacing=(1.0, 1.0, 1.0), series=SERIES, preset="B", num_cases=100, facts=None, chosen=None, **wishes
):
    base = base_plans(shape, spacing, len(series))
    facts = facts_of(series, num_cases, **(facts or {}))
    plans, decisions = plan(base, "3d_fullres", facts, "nnUNetCSMPlans", Wishes(preset, series=chosen, **wishes), GuessedMemory())
    # as nnU-Net will read them
    plans = json.loads(json.dumps(plans))
    return read_configuration(plans, "3d_fullres", "nnUNetCSMPlans.json"), plans, decisions


# --- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PLANNED)
@pytest.mark.parametrize("dataset", DATASETS)
def test_sizes_fit_the_data_and_the_budget(dataset, preset):
    shape, spacing, s = DATASETS[dataset]
    settings, _, _ = planned(shape, spacing, names(s), preset)
    token, patch = settings.architecture.token_size, settings.patch_size
    counts = [p // t for p, t in zip(patch, token, strict=True)]
    budget = read_preset(preset).max_patch_voxels

    assert all(p % t == 0 and t & (t - 1) == 0 for p, t in zip(patch, token, strict=True))
    # a token is at most a quarter of the volume, and of the patch; half of them where convolutions look beyond it
    attends = encoder_class(settings.architecture).attends
    least = MIN_TOKENS_PER_AXIS if attends else MIN_PLACES_PER_AXIS
    assert all(t == 1 or least * t <= length for t, length in zip(token, shape, strict=True))
    assert all(t == 1 or least * t <= p for p, t in zip(patch, token, strict=True))
    # no more voxels than the budget, unless no axis can give any
    assert math.prod(patch) <= budget or all(c <= least for c in counts)
    # nor a sequence that attention would spend its time on
    assert not attends or s * math.prod(counts) <= MAX_TOKENS or all(c <= least for c in counts)
    # not larger than the volume by more than half a token
    assert all(p <= length + t / 2 for p, t, length in zip(patch, token, shape, strict=True))
    # pretraining's patch is made of the same tokens, and no larger
    pretraining = settings.csm.pretraining_patch_size
    assert all(q % t == 0 and t <= q <= p for q, p, t in zip(pretraining, patch, token, strict=True))


# name: median shape, spacing, series, cases, GPU memory target in GiB; and the plan: preset, token, patch, the two batches
PLANS = {
    "brain": ((138, 170, 138), (1.0, 1.0, 1.0), 4, 484, None, "B", (16, 16, 16), (96, 96, 96), 64, 2),
    "brain, small GPU": ((138, 170, 138), (1.0, 1.0, 1.0), 4, 484, 5, "B", (16, 16, 16), (96, 96, 96), 32, 2),
    "brain, tiny GPU": ((138, 170, 138), (1.0, 1.0, 1.0), 4, 484, 3, "S", (16, 16, 16), (96, 96, 96), 16, 2),
    "no GPU to speak of": ((138, 170, 138), (1.0, 1.0, 1.0), 4, 484, 1.7, "S", (16, 16, 16), (64, 64, 80), 16, 2),
    "thick slices": ((20, 320, 320), (3.6, 0.625, 0.625), 3, 158, 24, "B", (2, 16, 16), (20, 176, 192), 64, 2),
    "sagittal": ((320, 320, 24), (0.5, 0.5, 4.0), 2, 100, 24, "B", (16, 16, 2), (192, 192, 24), 64, 2),
    "five slices": ((5, 256, 256), (8.0, 1.0, 1.0), 2, 100, 24, "B", (1, 16, 16), (5, 256, 256), 64, 4),
    "one slice": ((1, 256, 256), (8.0, 1.0, 1.0), 2, 100, 24, "B", (1, 16, 16), (1, 256, 256), 64, 4),
    "hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0), 1, 260, 24, "B", (8, 8, 8), (32, 48, 32), 64, 16),
    "smaller than a patch": ((18, 14, 12), (1.0, 1.0, 1.0), 3, 40, 24, "B", (4, 2, 2), (16, 14, 12), 64, 2),
    "one series": ((130, 320, 260), (1.0, 1.4, 1.4), 1, 200, 24, "B", (16, 16, 16), (128, 80, 80), 64, 2),
    "seven series": ((60, 200, 180), (1.5, 1.0, 1.0), 7, 300, 24, "B", (8, 16, 16), (64, 112, 112), 64, 2),
    "seven series, thin slices": ((24, 512, 512), (5.0, 0.5, 0.5), 7, 300, 24, "B", (2, 16, 16), (14, 144, 144), 64, 2),
    "large": ((480, 512, 512), (0.8, 0.75, 0.75), 1, 1000, 80, "B", (16, 16, 16), (96, 96, 96), 64, 2),
    "long and thin": ((1200, 40, 40), (1.0, 1.0, 1.0), 2, 50, 24, "B", (16, 8, 8), (544, 40, 40), 64, 2),
    "three cases": ((138, 170, 138), (1.0, 1.0, 1.0), 4, 3, 24, "B", (16, 16, 16), (96, 96, 96), 64, 2),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_of_a_fingerprint(name):
    shape, spacing, s, num_cases, target, *expected = PLANS[name]
    settings, _, decisions = planned(shape, spacing, names(s), "auto", num_cases, gpu_memory_target=target)
    csm = settings.csm
    found = [csm.preset, settings.architecture.token_size, settings.patch_size]
    found += [csm.pretraining.batch_size, csm.finetuning_schedule.batch_size]
    assert found == expected
    assert not any("MORE THAN" in d.reason for d in decisions)
    reference = read_preset(csm.preset).pretraining
    # another batch, another learning rate; and never so few steps that nothing is learned
    ratio = csm.pretraining.batch_size / reference.batch_size
    assert csm.pretraining.learning_rate == pytest.approx(reference.learning_rate * math.sqrt(ratio), rel=1e-2)
    assert csm.pretraining.num_iterations >= reference.min_steps > 0


def test_auto_plans_for_cpus_where_there_is_no_cuda_device_unless_told_of_a_gpu_elsewhere():
    chosen = {}
    for device, target in (("cpu", None), ("cpu", 24), ("cuda", None)):
        settings, _, decisions = planned(preset="auto", device=device, gpu_memory_target=target)
        (why,) = (d.reason for d in decisions if d.name == "network")
        chosen[device, target] = settings.csm.preset
        assert ("no CUDA device was found" in why and "-preset B" in why) == (settings.csm.preset == "cpu")
    assert chosen == {("cpu", None): "cpu", ("cpu", 24): "B", ("cuda", None): "B"}
    # a preset that was asked for is taken on any machine
    assert planned(preset="S", device="cpu")[0].csm.preset == "S"


def test_more_than_the_memory_there_is_is_said():
    _, _, decisions = planned(preset="B", gpu_memory_target=1.5)
    assert any("MORE THAN the target's 0.5 GiB" in d.reason for d in decisions)


# --- series ------------------------------------------------------------------------------------------------------------------


def test_series_that_subjects_lack_are_counted():
    facts = {"num_with_series": {"FLAIR": 100, "T1w": 90, "T2w": 0}, "num_present": {1: 10, 2: 90}}
    settings, _, decisions = planned(facts=facts)
    assert settings.architecture.series == ("FLAIR", "T1w") and settings.architecture.channels == (0, 1)
    reasons = {d.name: d.reason for d in decisions}
    assert "90 have T1w" in reasons["series"] and "no case has T2w" in reasons["series"]
    assert "10 have 1, 90 have 2" in reasons["series hidden whole"]


def test_series_by_hand_restrict_the_network_and_what_it_is_pretrained_on():
    sources = restricted([source_of(BT_MSD)], ("T2w", "FLAIR"))
    settings, _, _ = planned(series=BT_MSD, chosen=("T2w", "FLAIR"), facts={"sources": sources})
    assert settings.architecture.series == ("FLAIR", "T2w") and settings.architecture.channels == (0, 3)
    assert settings.pretraining_architecture.series == ("FLAIR", "T2w")
    with pytest.raises(UserError, match=r"-series ADC: Dataset001_Tiny has only FLAIR"):
        restricted([source_of(BT_MSD)], ("ADC",))
    with pytest.raises(UserError, match=r"-series ADC: expected some of FLAIR T1w T1ce T2w"):
        planned(series=BT_MSD, chosen=("ADC",))


def test_no_series_at_all_is_an_error():
    with pytest.raises(UserError, match="no training case has any series"):
        planned(facts={"num_with_series": dict.fromkeys(SERIES, 0)})


def test_sources_of_other_datasets_add_their_series_to_pretraining_only():
    other = source_of(("T2w", "ADC"), dataset="Dataset002_Other")
    settings, _, decisions = planned(facts={"sources": (source_of(SERIES), other), "num_pretraining_cases": 300})
    assert settings.architecture.series == SERIES
    assert settings.pretraining_architecture.series == (*SERIES, "ADC")
    assert "Dataset002_Other/imagesTr" in next(d.value for d in decisions if d.name == "pretraining draws on")


# --- sizes, further ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [("isotropic", (16, 16, 16)), ("seven series", (8, 16, 16)), ("large, as CT", (16, 16, 16)), ("five slices", (1, 16, 16))],
)
def test_tokens_are_cubes_where_spacing_is_near_isotropic_and_shorter_along_a_thick_axis(dataset, expected):
    shape, spacing, s = DATASETS[dataset]
    assert planned(shape, spacing, names(s))[0].architecture.token_size == expected


def test_the_papers_brain_tumours_have_216_tokens_a_series_of_which_27_are_visible():
    settings, _, decisions = planned((138, 170, 138), series=BT_MSD, preset="paper")
    assert settings.csm.preset == "bt_msd"
    assert settings.patch_size == settings.csm.pretraining_patch_size == (96, 96, 96)
    assert math.prod(settings.pretraining_grid) == 216
    assert num_visible(216, masking_of(settings).mask_ratio) == 27
    assert any("27 of 216" in decision.reason for decision in decisions)


def test_sizes_by_hand_are_taken():
    settings, _, decisions = planned(patch_size=(32, 64, 48), token_size=(4, 16, 8))
    assert settings.patch_size == (32, 64, 48) and settings.architecture.token_size == (4, 16, 8)
    assert [d.reason for d in decisions if d.name in ("patch size", "token size")] == ["by hand", "by hand"]


@pytest.mark.parametrize(
    ("by_hand", "words"),
    [
        ({"patch_size": (32, 64, 50), "token_size": (8, 8, 8)}, r"patch_size \(32, 64, 50\).*token_size \(8, 8, 8\)"),
        ({"patch_size": (32, 64, 50)}, r"patch_size \(32, 64, 50\)"),
        ({"patch_size": (0, 64, 64)}, "-overwrite_patch_size 0 x 64 x 64"),
        ({"token_size": (3, 8, 8)}, "powers of two"),
        ({"token_size": (0, 8, 8)}, "-overwrite_token_size 0 x 8 x 8"),
        ({"token_size": (1, 1, 1)}, "powers of two"),
    ],
)
def test_sizes_by_hand_that_do_not_fit_are_refused_with_the_sizes(by_hand, words):
    with pytest.raises(UserError, match=words):
        planned(**by_hand)


# --- nnU-Net -----------------------------------------------------------------------------------------------------------------


def test_the_plans_are_nnunets_with_our_network():
    settings, plans, _ = planned()
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    assert manager.plans_name == "nnUNetCSMPlans" and manager.dataset_name == "Dataset001_Tiny"
    assert configuration.network_arch_class_name == NETWORK_CLASS
    assert tuple(configuration.patch_size) == settings.patch_size
    assert configuration.batch_size == settings.csm.finetuning_schedule.batch_size
    # everything about the data is as it was
    for key in ("data_identifier", "spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name"):
        assert configuration.configuration[key] == base_plans()["configurations"]["3d_fullres"][key]


def test_nnunets_plans_are_not_changed():
    base = base_plans()
    before = copy.deepcopy(base)
    plans, _ = plan(base, "3d_fullres", facts_of(), "nnUNetCSMPlans", Wishes("B"), GuessedMemory())
    plans["configurations"]["3d_fullres"]["spacing"].append(9)
    plans["transpose_forward"].append(9)
    assert base == before


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_lowres", "3d_fullres_batch_4"])
def test_nnunet_finds_every_configuration_that_the_plans_name(configuration):
    """A parent, or a next stage that nnU-Net would look up after the last epoch."""
    plans, _ = plan(base_plans(), configuration, facts_of(), "nnUNetCSMPlans", Wishes("B"), GuessedMemory())
    manager = PlansManager(plans)
    for name in (configuration, *(manager.get_configuration(configuration).next_stage_names or ())):
        manager.get_configuration(name)


@pytest.mark.parametrize(
    ("configuration", "words"),
    [("3d_cascade_fullres", "cascade"), ("2d", "no 3-D configuration '2d'"), ("3d_half", "3d_fullres")],
)
def test_a_configuration_that_cannot_be_built_on_is_refused(configuration, words):
    with pytest.raises(UserError, match=words):
        plan(base_plans(), configuration, facts_of(), "nnUNetCSMPlans", Wishes("B"), GuessedMemory())


def test_a_plans_file_is_written_whole(tmp_path):
    _, plans, _ = planned()
    path = tmp_path / "nnUNetCSMPlans.json"
    save_json(plans, path)
    assert json.loads(path.read_text()) == plans
    assert list(tmp_path.iterdir()) == [path]


# --- decisions ---------------------------------------------------------------------------------------------------------------


def test_every_decision_has_a_reason_and_is_stored_beside_the_value():
    settings, _, decisions = planned()
    assert all(d.name and d.value and d.reason for d in decisions)
    assert len({d.name for d in decisions}) == len(decisions)
    assert settings.csm.reasons == {d.name: (d.value, d.reason) for d in decisions}
    assert {"series", "token size", "patch size", "mask ratio", "series hidden whole", "pretraining", "fine-tuning"} <= set(
        settings.csm.reasons
    )


@pytest.mark.parametrize(("series", "value"), [(["T2w"], "none"), (["T2w", "ADC"], "1 to 1"), (BT_MSD, "1 to 3")])
def test_the_number_of_hidden_series_is_told(series, value):
    _, _, decisions = planned(series=series)
    assert [d.value for d in decisions if d.name == "series hidden whole"] == [value]


@pytest.mark.parametrize(("preset", "num_cases"), [("B", 10), ("bt_msd", 484), ("breast2023", 1), ("demo", 3)])
def test_a_schedule_is_as_long_as_its_preset_says(preset, num_cases):
    settings, _, _ = planned(series=["T2w"], preset=preset, num_cases=num_cases)
    for chosen, wanted in (
        (settings.csm.pretraining, read_preset(preset).pretraining),
        (settings.csm.finetuning_schedule, read_preset(preset).finetuning),
    ):
        crops, _ = num_crops(wanted, num_cases)
        assert crops <= chosen.num_iterations * chosen.batch_size < crops + chosen.iterations_per_epoch * chosen.batch_size
        assert chosen.iterations_per_epoch <= wanted.iterations_per_epoch


# --- presets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_makes_plans(name):
    preset = read_preset(name)
    settings, _, _ = planned(series=preset.series or SERIES, preset=name)
    assert settings.csm.preset == name
    assert settings.architecture.width == preset.network["width"]


@pytest.mark.parametrize(
    ("series", "name"),
    [
        (BT_MSD, "bt_msd"),
        (BT_MSD[::-1], "bt_msd"),
        (("T1ce", "DWI", "T2w"), "breast2023"),
        (("T2w", "DWI", "ADC"), "prostate158"),
    ],
)
def test_the_papers_preset_is_chosen_by_the_series_in_any_order(series, name):
    assert paper_preset(series) == name


def test_series_the_paper_has_not_are_refused_and_its_datasets_listed():
    with pytest.raises(UserError, match=r"FLAIR, T1w, T2w.*bt_msd: FLAIR, T1w, T1ce, T2w.*prostate158: T2w, DWI, ADC.*-preset"):
        planned(preset="paper")


def test_an_unknown_preset_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(UserError, match=f"no preset 'XL'.*paper.*{', '.join(preset_names())}"):
        read_preset("XL")


def test_a_preset_file_changes_what_it_inherits_from(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"inherits_from": "demo", "network": {"depth": 5}, "pretext": {"masking": {"places": "shared"}}}')
    preset, demo = read_preset(str(path)), read_preset("demo")
    assert preset.network["depth"] == 5 and preset.pretext["masking"]["places"] == "shared"
    assert (preset.network["width"], preset.pretraining) == (demo.network["width"], demo.pretraining)
    assert planned(preset=str(path))[0].csm.preset == str(path)


def test_one_scale_for_all_is_planned_from_the_masks(tmp_path):
    def classification(scale, large):
        path = tmp_path / "mine.json"
        chosen = {"scale": scale, "patch_size": [32, 32, 64], "margin": 0.1}
        path.write_text(json.dumps({"inherits_from": "demo", "classification": chosen}))
        facts = {"mask_extent_mm": (20.0, 20.0, 20.0), "large_mask_mm": large}
        settings, plans, _ = planned(spacing=(2.0, 1.0, 1.0), preset=str(path), facts=facts)
        return settings.csm.classification.scale, plans["configurations"]["3d_fullres"]["csm"]["reasons"]["classification"][1]

    scale, why = classification("one", (80.0, 60.0, 60.0))
    assert scale == pytest.approx(60 * 1.2 / 32) and "all are made smaller by 2.25" in why
    # nothing is enlarged
    assert classification("one", (10.0, 10.0, 10.0))[0] == 1.0
    assert classification("each", (80.0, 60.0, 60.0))[0] == "each"
    with pytest.raises(UserError, match="none was measured"):
        classification("one", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"inherits_from": "demo", "depth": 5}', "unknown depth"),
        ('{"inherits_from": "demo", "pretext": {"masking": {"ratio": 0.5}}}', "unknown ratio"),
        ('{"network": {}}', "missing"),
        ('{"inherits_from": "none"}', "no preset 'none'"),
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
    ],
)
def test_a_preset_file_with_a_mistake_is_refused_and_named(tmp_path, text, words):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_preset(str(path))


def test_merging_changes_neither_side():
    base, changes = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 1}}
    assert merged(base, changes) == {"a": {"b": 9, "c": 2}, "d": {"e": 1}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3} and changes == {"a": {"b": 9}, "d": {"e": 1}}
