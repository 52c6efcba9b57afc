"""Plans are read back as they were written, and whatever is wrong in them is named, with the file."""

import json

import pytest
from factories import GRID_SIZE, PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, csm_plans

from nnunet_csm.errors import UserError
from nnunet_csm.plans import Architecture, Recipe, parse_configuration, read_configuration
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
    with pytest.raises(UserError) as caught:
        read_configuration(plans, name, FILE)
    message = str(caught.value)
    assert FILE in message
    return message


def test_what_was_written_is_read():
    settings = read_configuration(csm_plans(), "3d_fullres", FILE)
    assert settings.patch_size == PATCH_SIZE
    assert settings.architecture == Architecture(SERIES, (0, 1, 2), TOKEN_SIZE, **TINY)
    assert settings.csm.masking.mask_ratio == 0.875
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
        ["csm", "masking"],
        ["csm", "pretraining_patch_size"],
        ["csm", "masking", "mask_ratio"],
        ["csm", "pretraining", "betas"],
    ],
)
def test_a_missing_key_is_named(path):
    assert path[-1] in refused(edited(path, MISSING))


@pytest.mark.parametrize(
    "path",
    [
        ["architecture", "arch_kwargs", "dropout"],
        ["csm", "mask"],
        ["csm", "masking", "ratio"],
        ["csm", "finetuning_schedule", "momentum"],
    ],
)
def test_an_unknown_key_is_named_with_those_that_are_expected(path):
    message = refused(edited(path, 1))
    assert f"unknown {path[-1]}" in message and "expected exactly" in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["patch_size"], [8, 8], "patch_size is [8, 8], expected"),
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
        (["csm", "masking"], 0.875, "masking is 0.875, expected a JSON object"),
        (["csm", "masking", "places"], "same", "places is 'same', expected 'independent' | 'shared'"),
        (["csm", "masking", "hidden_series"], ["rebuilt"], "hidden_series is ['rebuilt'], expected"),
        (["csm", "masking", "mask_ratio"], "0.875", "mask_ratio is '0.875', expected float"),
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
@pytest.mark.parametrize("size", [[4, 12, 11], [1, 12, 10], [0, 12, 10], [-4, 12, 10]])
def test_a_patch_that_is_no_multiple_of_the_token_is_refused_with_both_sizes(path, size):
    message = refused(edited(path, size))
    assert path[-1] in message and str(tuple(size)) in message and str(TOKEN_SIZE) in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["architecture", "arch_kwargs", "token_size"], [2, 3, 2], "powers of two"),
        (["architecture", "arch_kwargs", "token_size"], [1, 1, 1], "powers of two"),
        (["architecture", "arch_kwargs", "token_size"], [0, 4, 2], "powers of two"),
        (["architecture", "arch_kwargs", "width"], 25, "multiple of num_heads 2"),
        (["architecture", "arch_kwargs", "depth"], 1, "depth 1 is too small"),
        (["architecture", "arch_kwargs", "num_heads"], 0, "num_heads 0"),
        (["csm", "reconstruction", "width"], 4, "width 4"),
        (["csm", "reconstruction", "num_heads"], 5, "multiple of num_heads 5"),
        (["csm", "masking", "mask_ratio"], 1.0, "mask_ratio is 1.0"),
        (["csm", "masking", "mask_ratio"], -0.1, "mask_ratio is -0.1"),
        (["csm", "version"], 99, "version is 99"),
    ],
)
def test_values_that_no_network_could_be_built_from_are_refused(path, value, words):
    assert words in refused(edited(path, value))
