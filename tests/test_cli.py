"""Every command explains itself, and what a user got wrong ends in exit code 2 and a line or two."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
from factories import DATASET_JSON, base_plans

from nnunet_csm import cli, nnunet
from nnunet_csm.cli import applying, planning
from nnunet_csm.dataset_conversion import FORMATS
from nnunet_csm.doctor import Finding
from nnunet_csm.plans import read_configuration


def below(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """Every command as it is typed, formats of `convert` among them."""
    found = dict[str, argparse.ArgumentParser]()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one, command in action.choices.items():
                found |= {f"{name} {one}".strip(): command, **below(command, f"{name} {one}".strip())}
    return found


COMMANDS = below(cli.build_parser())
# one command line for each command that needs a dataset
ON_A_DATASET = {
    "fingerprint": ["fingerprint", "-d", "1"],
    "plan": ["plan", "-d", "1"],
    "split": ["split", "-d", "1"],
    "plan_and_preprocess": ["plan_and_preprocess", "-d", "1"],
    "preprocess only": ["plan_and_preprocess", "-d", "1", "-preprocess_only"],
    "pretrain": ["pretrain", "-d", "1", "-device", "cpu"],
    "finetune": ["finetune", "-d", "1", "-device", "cpu"],
    "predict": ["predict", "-d", "1", "-i", "in", "-o", "out", "-f", "0"],
    "classify": ["classify", "-d", "1", "-i", "in", "-m", "masks", "-o", "out.csv"],
    "embed": ["embed", "-d", "1", "-i", "in", "-o", "out.csv"],
    "impute": ["impute", "-d", "1", "-i", "in", "-o", "out"],
    "fill missing only": ["predict", "--fill_missing_only", "-d", "1", "-i", "in", "-o", "out"],
    "export_weights": ["export_weights", "-d", "1", "-o", "out"],
    "container": ["container", "-d", "1", "-o", "out"],
    "study": ["study", "quick", "-d", "1", "-device", "cpu"],
    "evaluate": ["evaluate", "-d", "1", "-ref", "ref", "-pred", "pred"],
    "cite": ["cite", "-d", "1"],
}


def refused(arguments, capsys):
    """The command ends in exit code 2 with one or two lines, which are returned."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("Error: ")
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2
    return message


@pytest.fixture
def dataset(nnunet_folders):
    """A dataset that nnU-Net has planned."""
    folder = nnunet_folders.preprocessed / "Dataset001_Tiny"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (folder / "nnUNetPlans.json").write_text(json.dumps(base_plans()))
    return folder


# --- help --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Example: " in text and f"nnunet_csm {command}" in text.split("Example: ")[1]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_example_is_a_command_line_that_parses(command):
    example = (COMMANDS[command].epilog or "").removeprefix("Example: ")
    arguments = shlex.split(example.removeprefix('eval "$(').removesuffix(')"'))
    assert arguments[0] == "nnunet_csm"
    assert cli.build_parser().parse_args(arguments[1:]).run


def test_the_help_of_the_program_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS if " " not in command)


def test_every_command_that_needs_a_dataset_is_tested_here():
    others = {command.split()[0] for command in COMMANDS} - {line[0] for line in ON_A_DATASET.values()}
    assert others == {"convert", "demo", "doctor", "env", "import_weights", "probe"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_flags_with_a_value_have_one_dash_and_switches_two(command):
    for action in COMMANDS[command]._actions:
        if action.option_strings and action.dest != "help":
            assert action.option_strings[0].startswith("--") == (action.nargs == 0), action.option_strings


def test_formats_are_those_that_can_be_read():
    assert [name.removeprefix("convert ") for name in COMMANDS if " " in name] == [*FORMATS, "to_msd", "to_dicom"]


@pytest.mark.parametrize(
    ("name", "family", "flags"), [("preprocess", planning, ["-np", "1"]), ("fill_missing", applying, ["-i", "in", "-o", "out"])]
)
def test_an_old_name_runs_the_new_command_and_says_so(name, family, flags, monkeypatch, capsys):
    new, seen = cli.RENAMED[name], []

    def command(args):
        seen.append(args)
        return 0

    monkeypatch.setattr(cli.nnunet, "dataset_name", lambda name: name)
    monkeypatch.setattr(family, new[0], command)
    assert cli.main([name, "-d", "1", *flags]) == 0 == cli.main([*new, "-d", "1", *flags])
    assert seen[0] == seen[1]
    assert capsys.readouterr().err.splitlines() == [f"`nnunet_csm {name}` is now `nnunet_csm {' '.join(new)}`, which is run"]


def test_old_names_are_no_commands_and_new_ones_are():
    for name, new in cli.RENAMED.items():
        assert name not in COMMANDS and new[0] in {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize(
    "old",
    [
        ["study", "quick", "-dry_run"],
        ["study", "quick", "-report_only"],
        ["convert", "bt_msd", "-i", "in", "-d", "1", "-regions"],
    ],
)
def test_an_old_spelling_of_a_switch_is_taken(old):
    new = [*old[:-1], f"-{old[-1]}"]
    assert cli.build_parser().parse_args(old) == cli.build_parser().parse_args(new)


def test_neither_help_nor_a_mistyped_dataset_waits_for_torch(nnunet_folders):
    lines = [["--help"], *ON_A_DATASET.values(), ["doctor", "-d", "1"], ["convert", "to_msd", "--help"]]
    code = (
        "import contextlib, io, json, sys\n"
        "from nnunet_csm import cli\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        cli.main(line)\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no dataset '1'") == len(lines) - 2


# --- what a user got wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", nnunet.FOLDER_VARIABLES)
@pytest.mark.parametrize("command", sorted(ON_A_DATASET))
def test_a_missing_variable_of_nnunet_is_named(command, missing, nnunet_folders, monkeypatch, capsys):
    monkeypatch.delenv(missing)
    message = refused(ON_A_DATASET[command], capsys)
    assert f"{missing} is not set" in message and f"export {missing}=" in message


@pytest.mark.parametrize("command", sorted(ON_A_DATASET))
def test_a_missing_dataset_is_named_with_the_folders_looked_at(command, nnunet_folders, capsys):
    message = refused(ON_A_DATASET[command], capsys)
    assert "'1'" in message and str(nnunet_folders.raw) in message


@pytest.mark.parametrize("name", ["Dataset007_Gone", "Tiny", "Dataset1"])
def test_a_dataset_by_a_name_there_is_not_is_refused(name, nnunet_folders, capsys):
    assert name in refused(["plan", "-d", name], capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-preset", "nonsense"], "no preset 'nonsense'"),
        (["-series", "ADC"], "-series ADC: no dataset of -d has it"),
        (["-series_alias", "DWI=ADC"], "no dataset has a channel of that name"),
        (["-gpu_memory_target", "0"], "expected GiB above 0"),
        (["-overwrite_target_spacing", "1", "1", "1"], "belongs to --joint"),
        (["-weights", "2"], "-weights 2: expected, with --joint, a number above 0 for each of the 1 datasets"),
        (["--joint"], "at least two"),
        (["-d", "1", "Dataset001_Tiny"], "names a dataset twice"),
        (["-overwrite_patch_size", "4", "4", "4", "-overwrite_token_size", "4", "4", "4"], "single token"),
    ],
)
def test_contradictory_wishes_are_refused_before_anything_is_read(flags, words, dataset, capsys):
    assert words in refused(["plan", "-d", "1", *flags], capsys)
    assert not (dataset / "nnUNetCSMPlans.json").exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_dataset_that_was_not_planned_is_refused_with_the_remedy(command, dataset, capsys):
    message = refused(ON_A_DATASET[command], capsys)
    assert str(dataset / "nnUNetCSMPlans.json") in message and "nnunet_csm plan" in message


def test_a_dataset_that_nnunet_has_not_planned_is_refused_with_the_remedy(dataset, capsys):
    (dataset / "nnUNetPlans.json").unlink()
    message = refused(ON_A_DATASET["plan"], capsys)
    assert str(dataset / "nnUNetPlans.json") in message and "run nnUNetv2_plan_and_preprocess -d 1" in message
    (dataset / "nnUNetResEncUNetMPlans.json").write_text("{}")
    assert "-p nnUNetResEncUNetMPlans builds on what is there; else run" in refused(ON_A_DATASET["plan"], capsys)


def test_plans_of_another_planner_are_asked_for_before_nnunet_makes_its_own(planned_dataset, capsys, monkeypatch):
    for name, value in planned_dataset.environment.items():
        monkeypatch.setenv(name, value)
    before = sorted(planned_dataset.folders.preprocessed.rglob("*"))
    message = refused(["plan_and_preprocess", "-d", "900", "-p", "nnUNetResEncUNetMPlans"], capsys)
    assert "nnUNetResEncUNetMPlans.json: no such file" in message and "-pl nnUNetPlannerResEncM" in message
    assert sorted(planned_dataset.folders.preprocessed.rglob("*")) == before


def test_a_plans_file_that_is_no_json_is_named(dataset, capsys):
    (dataset / "nnUNetPlans.json").write_text("{")
    assert "nnUNetPlans.json: not valid JSON" in refused(ON_A_DATASET["plan"], capsys)


def test_a_fold_that_was_not_trained_is_refused(dataset, capsys):
    message = refused(ON_A_DATASET["predict"], capsys)
    assert "fold_0" in message and "nnunet_csm finetune -d 1" in message


def test_an_alias_of_the_wrong_form_is_refused(dataset, capsys):
    assert "-series_alias" in refused(["plan", "-d", "1", "-series_alias", "T1"], capsys)


def test_sizes_by_hand_that_do_not_fit_are_refused(dataset, capsys):
    flags = ["-overwrite_patch_size", "32", "32", "30", "-overwrite_token_size", "8", "8", "8"]
    message = refused(["plan", "-d", "1", *flags], capsys)
    assert "(32, 32, 30)" in message and "(8, 8, 8)" in message
    assert not (dataset / "nnUNetCSMPlans.json").exists()


# --- what they do ------------------------------------------------------------------------------------------------------------


def test_plan_writes_plans_beside_nnunets_and_prints_every_decision(dataset, capsys):
    before = (dataset / "nnUNetPlans.json").read_text()
    assert cli.main(["plan", "-d", "1", "-preset", "demo", "-series_alias", "T1w=T1ce"]) == 0
    printed = capsys.readouterr().out
    plans = json.loads((dataset / "nnUNetCSMPlans.json").read_text())
    settings = read_configuration(plans, "3d_fullres", "plans")
    assert settings.architecture.series == ("FLAIR", "T1ce", "T2w")
    assert "series T1w -> T1ce" in printed
    assert all(name in printed for name in settings.csm.reasons)
    assert (dataset / "nnUNetPlans.json").read_text() == before


@pytest.mark.parametrize("preset, cuda", [("S", False), ("cpu", False), ("S", True)])
def test_plan_says_how_long_it_takes_here_and_what_to_do_about_it(dataset, monkeypatch, capsys, preset, cuda):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a GPU")
    monkeypatch.setattr("nnunet_csm.pretext.cost.measured_speed", lambda _: 1e13 if cuda else 1e11)
    assert cli.main(["plan", "-d", "1", "-preset", preset]) == 0
    printed = capsys.readouterr().out
    place = "a GPU" if cuda else "1 core of this machine"
    assert re.search(rf"expected on {place}: pretraining [\d a-z]+, fine-tuning [\d a-z]+ \(", printed)
    assert ("no CUDA device was found: train with -device cpu" in printed) != cuda
    assert ("`nnunet_csm plan -preset cpu`" in printed) == (preset == "S" and not cuda)


@pytest.mark.parametrize("num_cases, splits, warned", [(4, False, True), (5, False, False), (4, True, False)])
def test_plan_says_at_once_what_a_training_will_refuse(dataset, capsys, num_cases, splits, warned):
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON | {"numTraining": num_cases}))
    if splits:
        (dataset / "splits_final.json").write_text("[]")
    assert cli.main(["plan", "-d", "1", "-preset", "demo"]) == 0
    said = f"{dataset}: {num_cases} cases cannot be split into 5 folds; use all of them with fold all"
    assert (said in capsys.readouterr().out) == warned


def test_plan_never_overwrites_nnunets_plans(dataset, capsys):
    before = (dataset / "nnUNetPlans.json").read_text()
    refused(["plan", "-d", "1", "-overwrite_plans_name", "nnUNetPlans"], capsys)
    assert (dataset / "nnUNetPlans.json").read_text() == before


def test_planning_again_tells_of_changes_only_and_keeps_other_configurations(dataset, capsys):
    for arguments, replaces in ((["-preset", "S"], False), (["-preset", "S"], False), (["-preset", "demo"], True)):
        assert cli.main(["plan", "-d", "1", *arguments]) == 0
        assert ("replacing other plans" in capsys.readouterr().out) == replaces
    assert cli.main(["plan", "-d", "1", "-c", "3d_lowres"]) == 0
    plans = json.loads((dataset / "nnUNetCSMPlans.json").read_text())
    assert set(plans["configurations"]) == {"3d_fullres", "3d_lowres"}
    assert plans["configurations"]["3d_fullres"]["csm"]["preset"] == "demo"


def exported(capsys):
    """The value a shell would get."""
    assert cli.main(["env"]) == 0
    word, assignment = shlex.split(capsys.readouterr().out)
    assert word == "export"
    variable, _, value = assignment.partition("=")
    assert variable == "nnUNet_extTrainer"
    return value


def test_env_exports_the_folder_of_our_trainers(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    value = exported(capsys)
    assert value == str(nnunet.TRAINER_FOLDER) and os.path.isdir(value)


def test_env_keeps_what_the_user_has_there_and_ours_once(monkeypatch, capsys):
    monkeypatch.setenv(
        "nnUNet_extTrainer", os.pathsep.join(["/my/trainers", str(nnunet.TRAINER_FOLDER), "/a folder/with 'quotes'"])
    )
    once = exported(capsys)
    assert sorted(once.split(os.pathsep)) == sorted(["/my/trainers", str(nnunet.TRAINER_FOLDER), "/a folder/with 'quotes'"])
    monkeypatch.setenv("nnUNet_extTrainer", once)
    assert exported(capsys) == once


def test_running_a_command_of_nnunet_leaves_our_own_command_line_as_it_was(monkeypatch):
    seen: dict[str, Any] = {}

    def entry_point():
        seen["argv"], seen["trainers"] = sys.argv, os.environ["nnUNet_extTrainer"]
        raise SystemExit(1)

    monkeypatch.setenv("nnUNet_extTrainer", "/my/trainers")
    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", entry_point)
    monkeypatch.setattr("sys.argv", ["nnunet_csm", "pretrain"])
    with pytest.raises(SystemExit):
        nnunet.run("nnunetv2.run.run_training:run_training_entry", ["1", "3d_fullres", "0"])
    assert seen["argv"] == ["run_training_entry", "1", "3d_fullres", "0"]
    assert seen["trainers"].split(os.pathsep) == [str(nnunet.TRAINER_FOLDER), "/my/trainers"]
    assert sys.argv == ["nnunet_csm", "pretrain"]


def test_training_hands_nnunets_own_flags_to_nnunet(dataset, monkeypatch, capsys):
    assert cli.main(["plan", "-d", "1", "-preset", "demo"]) == 0
    calls = []

    def run_apart(entry_point, arguments):
        calls.append(list(arguments))
        return 0

    monkeypatch.setattr(nnunet, "run_apart", run_apart)
    assert cli.main(["finetune", "-d", "1", "-f", "0", "1", "-device", "cpu", "--npz"]) == 0
    flags = ["-tr", "nnUNetTrainerCSM", "-p", "nnUNetCSMPlans", "-device", "cpu", "-num_gpus", "1", "--npz"]
    assert calls == [["Dataset001_Tiny", "3d_fullres", fold, *flags] for fold in ("0", "1")]


def test_a_rank_that_nnunet_started_and_that_died_is_named_unless_it_said_why(dataset, monkeypatch, capsys):
    from torch.multiprocessing import ProcessExitedException

    assert cli.main(["plan", "-d", "1", "-preset", "demo"]) == 0
    capsys.readouterr()
    ended = ProcessExitedException("", error_index=1, error_pid=7, exit_code=-9, signal_name="SIGKILL")

    def run(entry_point, arguments):
        raise ended

    monkeypatch.setattr(nnunet, "run", run)
    command = ["finetune", "-d", "1", "-f", "0", "-device", "cpu"]
    assert "rank 1 ended with SIGKILL" in refused(command, capsys)
    ended = ProcessExitedException("", error_index=1, error_pid=7, exit_code=2)
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    assert caught.value.code == 2 and not capsys.readouterr().err


def test_doctor_names_what_is_missing_and_does_not_stop_there(nnunet_folders, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    nnunet_folders.raw.rmdir()
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("MISSING") and "nnUNet_results" in line for line in lines)
    assert f"         -> mkdir -p {nnunet_folders.raw}" in lines
    assert sum("found as nnU-Net finds it" in line for line in lines) == 3
    assert lines[-1].endswith("to look at")


@pytest.mark.parametrize("mark, code", [("optional", 0), ("MISSING", 2), ("WRONG", 2)])
def test_a_strict_doctor_ends_in_exit_code_2_but_for_what_is_optional(mark, code, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_csm.doctor.examine", lambda *_: [Finding("a", "well"), Finding("b", "not well", "mend it", mark)])
    assert cli.main(["doctor", "--strict"]) == code and cli.main(["doctor"]) == 0
    assert f"{mark:<8} b" in capsys.readouterr().out


def test_a_doctor_ends_in_an_error_where_a_file_cannot_be_used(monkeypatch, capsys):
    findings = [Finding("a", "not usable", "mend a", "UNUSABLE"), Finding("b", "not well", "mend b")]
    monkeypatch.setattr("nnunet_csm.doctor.examine", lambda *_: findings)
    assert refused(["doctor"], capsys) == "Error: mend a"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["-pred", "a.csv", "out"], "-pred a.csv out: give -pred one folder"),
        (["-pred", "a.csv", "--chill"], "-pred a.csv --chill: give -pred one folder"),
        (["-pred", "out", "out2", "-d", "1", "-ref", "r"], "-pred out out2 -d -ref: give"),
        (["-pred", "a.csv", "-ref", "r"], "-pred a.csv -ref: give"),
        (["-pred", "a.csv", "-d", "1"], "-pred a.csv -d: give"),
        (["-pred", "out", "-d", "1", "-ref", "r", "-against", "a.csv"], "-pred out -against -d -ref: give"),
        (["-pred", "out", "-d", "1"], "-pred out -d: give -pred one folder of segmentations, with -d and -ref"),
        (["-pred", "out"], "or CSV files of a classifier, alone or with -against"),
        (["-pred", "out", "-d", "1", "-images", "i", "-regions", "a=1"], "or with -d and -images for pictures alone"),
        (["-pred", "a.csv"], "a.csv: no such file"),
        (["-pred", "out", "-d", "1", "-ref", "r"], "r "),
    ],
)
def test_evaluate_is_given_segmentations_or_tables(flags, words, dataset, capsys):
    assert words in refused(["evaluate", *flags], capsys)


@pytest.mark.parametrize(
    "flags", [["-preset", "S"], ["--joint"], ["-p", "Others"], ["--verify_dataset_integrity"], ["-overwrite_plans_name", "X"]]
)
def test_what_only_preprocesses_takes_no_flag_of_planning(flags, dataset, capsys):
    line = ["plan_and_preprocess", "-d", "1", "-preprocess_only", "nnUNetCSMPlans"]
    assert "takes plans as they are" in refused([*line, *flags], capsys)
    assert "nnUNetCSMPlans.json: no such file" in refused([*line, "-np", "1", "--overwrite"], capsys)


@pytest.mark.parametrize("flag", ["--copy", "--keep_copies", "--overwrite"])
def test_flags_of_filling_are_refused_in_prediction(flag, dataset, capsys):
    assert f"{flag}: only with --fill_missing_only" in refused([*ON_A_DATASET["predict"], flag], capsys)


@pytest.mark.parametrize("variable", ["nnUNet_npp", "nnUNet_n_proc_DA", "nnUNet_def_n_proc"])
def test_a_variable_that_is_no_number_is_named(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "abc")
    with pytest.raises(SystemExit) as ended:
        cli.main(["env"])
    assert ended.value.code == 2 and f"{variable} is 'abc', expected a whole number" in capsys.readouterr().err
