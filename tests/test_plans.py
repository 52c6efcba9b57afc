"""Plans are read back as they were written, and whatever is wrong in them is named, with the file."""

import dataclasses
import json
import math

import pytest
from factories import GRID_SIZE, JOINT, PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, as_version_2, csm_plans, settings

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import VERSION, Architecture, Recipe, parse_configuration, read_configuration
from nnunet_csm.pretext.base import PRETEXTS, Pretext, setup_of
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.csm import Settings as CSMSettings
from nnunet_csm.pretext.mae3d import MAE3D
from nnunet_csm.pretext.masking import Masking
from nnunet_csm.pretext.rebuilding import Reconstruction
from nnunet_csm.schema import from_dict, to_dict

FILE = "/data/nnUNetCSMPlans.json"
ENTRY = ("configurations", "3d_fullres")
MISSING = object()


def edited(path, value):
    """CSM plans with the entry at `path` of the configuration replaced, or taken out."""
    plans = csm_plans()
    *parents, last = path
    part = plans
    for key in (*ENTRY, *parents):
        part = part[key]
    if value is MISSING:
        del part[last]
    else:
        part[last] = value
    return plans


def refused(plans, name="3d_fullres"):
    """What is said of plans from which nothing can be pretrained."""
    with pytest.raises(UserError) as caught:
        setup_of(read_configuration(plans, name, FILE), FILE)
    message = str(caught.value)
    assert FILE in message
    return message


def test_what_was_written_is_read():
    settings = read_configuration(csm_plans(), "3d_fullres", FILE)
    assert settings.patch_size == PATCH_SIZE
    assert settings.architecture == Architecture(SERIES, (0, 1, 2), TOKEN_SIZE, **TINY)
    pretext, setup = setup_of(settings, FILE)
    assert pretext is CSM
    assert setup.settings == CSMSettings(Masking(0.875, "independent", "rebuilt"), Reconstruction(12, 1, 2, False, 0.25))
    assert (setup.architecture, setup.patch_size, setup.grid) == (settings.architecture, PATCH_SIZE, GRID_SIZE)
    assert settings.pretraining_grid == GRID_SIZE
    assert settings.csm.reasons


def test_plans_survive_json():
    settings = read_configuration(csm_plans(), "3d_fullres", FILE)
    for cls, value in ((Architecture, settings.architecture), (Recipe, settings.csm)):
        assert from_dict(cls, json.loads(json.dumps(to_dict(value))), FILE) == value
    entry = csm_plans()["configurations"]["3d_fullres"]
    assert parse_configuration(json.loads(json.dumps(entry)), FILE) == settings


def test_an_optimisation_has_as_many_iterations_as_its_epochs():
    plans = csm_plans(pretraining={"num_epochs": 7, "iterations_per_epoch": 11})
    assert read_configuration(plans, "3d_fullres", FILE).csm.pretraining.num_iterations == 77


def test_an_unknown_configuration_is_refused_and_the_known_ones_are_named():
    message = refused(csm_plans(), "3d_lowres")
    assert "3d_lowres" in message and "3d_fullres" in message and "-c" in message


def test_plans_without_our_block_are_refused_with_the_remedy():
    message = refused(edited(["csm"], MISSING))
    assert "csm" in message and "nnunet_csm plan" in message


@pytest.mark.parametrize(
    "path",
    [
        ["patch_size"],
        ["architecture"],
        ["architecture", "arch_kwargs"],
        ["architecture", "arch_kwargs", "series"],
        ["csm", "pretext"],
        ["csm", "pretext", "name"],
        ["csm", "pretext", "masking"],
        ["csm", "pretraining_patch_size"],
        ["csm", "pretext", "masking", "mask_ratio"],
        ["csm", "pretraining", "betas"],
    ],
)
def test_a_missing_key_is_named(path):
    assert path[-1] in refused(edited(path, MISSING))


@pytest.mark.parametrize(
    "path",
    [
        ["architecture", "arch_kwargs", "dropout"],
        ["architecture", "arch_kwargs", "encoder", "gain"],
        ["csm", "mask"],
        ["csm", "pretext", "mask"],
        ["csm", "pretext", "masking", "ratio"],
        ["csm", "finetuning_schedule", "momentum"],
    ],
)
def test_an_unknown_key_is_named_with_those_that_are_expected(path):
    message = refused(edited(path, 1))
    assert f"unknown {path[-1]}" in message and "expected exactly" in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["patch_size"], [8, 8], "patch_size 2; expected as many"),
        (["patch_size"], 8, "patch_size is 8, expected"),
        (["patch_size"], [4, 12, 10.0], "patch_size[2] is 10.0, expected int"),
        (["architecture"], None, "architecture"),
        (["architecture", "arch_kwargs"], [1], "arch_kwargs is [1], expected a JSON object"),
        (["architecture", "arch_kwargs", "series"], "T1w", "series is 'T1w', expected"),
        (["architecture", "arch_kwargs", "series"], ["T1w", 2], "series[1] is 2, expected str"),
        (["architecture", "arch_kwargs", "width"], "24", "width is '24', expected int"),
        (["architecture", "arch_kwargs", "depth"], 3.0, "depth is 3.0, expected int"),
        (["architecture", "arch_kwargs", "depth"], True, "depth is True, expected int"),
        (["architecture", "arch_kwargs", "drop_path"], None, "drop_path is None, expected float"),
        (["csm"], [], "csm is [], expected a JSON object"),
        (["csm", "seed"], "abc", "seed is 'abc', expected int"),
        (["csm", "reasons"], {"patch size": 3}, "reasons.patch size is 3, expected"),
        (
            ["architecture", "arch_kwargs", "encoder", "positions"],
            "learned",
            "positions is 'learned', expected 'geometric' | 'mae'",
        ),
        (["csm", "pretext"], "csm", "pretext is 'csm', expected"),
        (["csm", "pretext", "reconstruction", "head"], 3, "head is 3, expected 'shared' | 'by_series'"),
        (["csm", "pretext", "masking", "fewest_hidden"], 0.5, "fewest_hidden is 0.5, expected int"),
        (["csm", "pretext", "masking"], 0.875, "masking is 0.875, expected a JSON object"),
        (["csm", "pretext", "masking", "places"], "same", "places is 'same', expected 'independent' | 'shared'"),
        (["csm", "pretext", "masking", "hidden_series"], ["rebuilt"], "hidden_series is ['rebuilt'], expected"),
        (["csm", "pretext", "masking", "mask_ratio"], "0.875", "mask_ratio is '0.875', expected float"),
        (["csm", "pretraining", "betas"], [0.9, 0.95, 0.99], "betas is [0.9, 0.95, 0.99], expected"),
        (["csm", "pretraining", "warmup"], False, "warmup is False, expected float"),
        (["csm", "finetuning", "mirroring"], "no", "mirroring is 'no', expected bool"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_the_value(path, value, words):
    assert words in refused(edited(path, value))


def test_whole_numbers_will_do_for_rates():
    settings = read_configuration(edited(["csm", "pretraining", "warmup"], 0), "3d_fullres", FILE)
    assert settings.csm.pretraining.warmup == 0.0 and isinstance(settings.csm.pretraining.warmup, float)


@pytest.mark.parametrize("path", [["patch_size"], ["csm", "pretraining_patch_size"]])
@pytest.mark.parametrize("size", [[4, 12, 11], [1, 12, 10], [6, 12, 11]])
def test_a_patch_that_is_no_multiple_of_the_token_is_refused_with_both_sizes(path, size):
    message = refused(edited(path, size))
    assert path[-1] in message and str(tuple(size)) in message and str(TOKEN_SIZE) in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["architecture", "arch_kwargs", "token_size"], [2, 3, 2], "powers of two"),
        (["architecture", "arch_kwargs", "token_size"], [1, 1, 1], "powers of two"),
        (["architecture", "arch_kwargs", "token_size"], [0, 4, 2], "token_size[0] is 0, expected 1 <= token_size[0]"),
        (["patch_size"], [-4, 12, 10], "patch_size[0] is -4, expected 1 <= patch_size[0]"),
        (["patch_size"], [4, 12 * 2**12, 10 * 2**12], "more than 2,147,483,648 voxels"),
        (["architecture", "arch_kwargs", "width"], 25, "multiple of num_heads 2"),
        (["architecture", "arch_kwargs", "depth"], 1, "depth 1 is too small"),
        (["architecture", "arch_kwargs", "num_heads"], 0, "num_heads is 0, expected 1 <= num_heads"),
        (["csm", "pretext", "reconstruction", "width"], 4, "width 4"),
        (["csm", "pretext", "reconstruction", "num_heads"], 5, "multiple of num_heads 5"),
        (["csm", "pretext", "masking", "mask_ratio"], 1.0, "mask_ratio is 1.0"),
        (["csm", "pretext", "masking", "mask_ratio"], -0.1, "mask_ratio is -0.1"),
        (["csm", "pretext", "masking", "fewest_hidden"], -1, "fewest_hidden is -1"),
        (["csm", "pretext", "reconstruction", "rebuilt_share"], 0.0, "rebuilt_share is 0.0"),
        (["csm", "pretext", "reconstruction", "depth"], 0, "depth is 0"),
        (["csm", "version"], 99, "version is 99"),
        (["csm", "seed"], -1, "csm.seed is -1, expected 0 <= seed"),
        (["csm", "pretraining", "learning_rate"], math.nan, "learning_rate is nan, expected a finite number"),
        (["csm", "pretraining", "learning_rate"], 10**400, "expected a finite number"),
        (["csm", "pretraining", "learning_rate"], 0, "learning_rate is 0, expected 0 < learning_rate"),
        (["csm", "pretraining", "warmup"], 2.0, "warmup is 2.0, expected 0 <= warmup < 1"),
        (["csm", "pretraining", "val_iterations_per_epoch"], 0, "val_iterations_per_epoch is 0, expected 1 <= "),
        (["csm", "pretraining", "num_epochs"], 0, "num_epochs is 0, expected 1 <= num_epochs"),
        (["csm", "pretraining", "iterations_per_epoch"], 0, "pretraining.iterations_per_epoch is 0, expected 1 <= "),
        (["csm", "pretraining", "betas"], [0.9, 1.0], "betas[1] is 1.0, expected 0 <= betas[1] < 1"),
        (["csm", "finetuning_schedule", "weight_decay"], -0.1, "weight_decay is -0.1, expected 0 <= weight_decay"),
        (["csm", "finetuning_schedule", "layer_decay"], 1.5, "layer_decay is 1.5, expected 0 < layer_decay <= 1"),
        (["csm", "finetuning", "ema"], math.inf, "ema is inf, expected a finite number"),
        (["csm", "finetuning", "series_dropout"], 1.1, "series_dropout is 1.1, expected 0 <= series_dropout <= 1"),
        (["csm", "classification", "margin"], -1, "margin is -1, expected 0 <= margin"),
        (["csm", "classification", "label_smoothing"], 1, "label_smoothing is 1, expected 0 <= label_smoothing < 1"),
        (["csm", "sources", 0, "channels"], {"FLAIR": 7}, "sources[0] has 3 channels, and series in {'FLAIR': 7}"),
        (["csm", "sources", 0, "channels"], {"FLAIR": 0, "T1w": 0, "T2w": 1}, "one of these channels"),
        (["architecture", "arch_kwargs", "width"], 10**9, "width is 1000000000, expected 1 <= width <= 65536"),
        (["architecture", "arch_kwargs", "encoder", "query_key_gain"], -math.inf, "query_key_gain is -inf, expected a finite"),
    ],
)
def test_values_that_no_network_could_be_built_from_are_refused(path, value, words):
    assert words in refused(edited(path, value))


# --- pretexts, encoders, fusions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unknown", "no.such.Module", "nnunet_csm.pretext.csm.Nothing", "", "csm."])
def test_an_unknown_pretext_is_refused_and_those_there_are_are_named(name):
    message = refused(edited(["csm", "pretext", "name"], name))
    assert f"csm.pretext.name is {name!r}, expected one of {', '.join(PRETEXTS)}, or the dotted path of a class" in message


def test_a_class_that_is_no_pretext_is_refused():
    message = refused(edited(["csm", "pretext", "name"], "nnunet_csm.pretext.masking.Masking"))
    assert "is no pretext" in message and Pretext.__name__ in message


def test_a_pretext_is_found_by_the_path_of_its_class():
    by_path = read_configuration(edited(["csm", "pretext", "name"], "nnunet_csm.pretext.csm.CSM"), "3d_fullres", FILE)
    assert setup_of(by_path, FILE) == setup_of(settings(), FILE)


@pytest.mark.parametrize(("name", "kind"), [("csm", "joint_vit"), ("mae3d", "vit")])
def test_a_pretext_whose_encoder_is_another_kind_is_refused_with_the_remedy(name, kind):
    plans = csm_plans(architecture={"encoder": {"kind": kind}}, pretext=name)
    assert f"encoder.kind in arch_kwargs is {kind!r}; set it to" in refused(plans)


@pytest.mark.parametrize(("key", "value"), [("places", "shared"), ("hidden_series", "none"), ("fewest_hidden", 0)])
def test_what_joint_tokens_cannot_have_is_unknown_to_mae3d(key, value):
    plans = csm_plans(**JOINT)
    plans["configurations"]["3d_fullres"]["csm"]["pretext"]["masking"][key] = value
    assert f"csm.pretext.masking: unknown {key}; expected exactly mask_ratio, background" in refused(plans)


def test_an_unknown_kind_of_encoder_is_refused_and_those_there_are_are_named():
    architecture = settings(architecture={"encoder": {"kind": "swin"}}).architecture
    with pytest.raises(UserError, match=r"encoder\.kind in arch_kwargs is 'swin', expected one of vit, joint_vit"):
        build_encoder(architecture)


@pytest.mark.parametrize("num_series", [1, 3])
def test_an_unknown_fusion_is_refused_and_those_there_are_are_named(num_series):
    architecture = settings(series=SERIES[:num_series], architecture={"fusion": "sum"}).architecture
    with pytest.raises(UserError, match=r"fusion in arch_kwargs is 'sum', expected one of mean, projected"):
        CSMSegmenter(num_series, 3, **to_dict(architecture))


# --- plans of before version 3 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, JOINT], ids=["csm", "joint"])
def test_plans_of_version_2_read_as_those_that_are_written_now(changes):
    old = as_version_2(csm_plans(**changes))
    before = json.dumps(old)
    found, expected = (read_configuration(plans, "3d_fullres", FILE) for plans in (old, csm_plans(**changes)))
    assert setup_of(found, FILE) == setup_of(expected, FILE)
    assert setup_of(found, FILE)[0] is (MAE3D if changes else CSM)
    # but for the pretext's defaults, which version 2 wrote
    assert dataclasses.replace(found, csm=dataclasses.replace(found.csm, pretext=expected.csm.pretext)) == expected
    assert found.csm.version == VERSION and json.dumps(old) == before


def test_a_key_that_version_2_did_not_know_is_still_unknown():
    plans = as_version_2(csm_plans())
    plans["configurations"]["3d_fullres"]["csm"]["masking"]["ratio"] = 0.5
    assert "masking: unknown ratio" in refused(plans)


def test_plans_from_before_joint_tokens_and_background_are_csms():
    old = as_version_2(csm_plans())
    entry = old["configurations"]["3d_fullres"]
    del entry["architecture"]["arch_kwargs"]["joint_tokens"], entry["csm"]["masking"]["background"]
    assert setup_of(read_configuration(old, "3d_fullres", FILE), FILE) == setup_of(settings(), FILE)


@pytest.mark.parametrize("changes", [{}, JOINT], ids=["csm", "joint"])
def test_nnunet_builds_the_network_of_version_2_from_its_own_arguments(changes):
    arguments = as_version_2(csm_plans(**changes))["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert "joint_tokens" in arguments
    assert CSMSegmenter(len(SERIES), 3, **arguments).architecture == settings(**changes).architecture
