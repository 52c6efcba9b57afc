"""A class table is read as it was meant or refused with its line; splits keep patients whole and classes even."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_folders import NnunetFolders

from nnunet_csm.data.diagnoses import (
    ClassTable,
    Sample,
    read_class_table,
    told_order,
    write_class_table,
)
from nnunet_csm.data.splits import repeated_splits, split_problems, stratified_folds
from nnunet_csm.doctor import of_classes
from nnunet_csm.errors import UserError
from nnunet_csm.planning.classification import check_classification, series_lines, split_dataset, take_class_table
from nnunet_csm.raw.manifest import MANIFEST

TABLE = "case,class,mask_label,patient\nb,benign,2,P1\nb,malignant,1,P1\na,malignant,1,P1\nc,benign,1,P2\n"
SAMPLES = (
    Sample("a", 1, 1, "P1"),
    Sample("b", 1, 1, "P1"),
    Sample("b", 0, 2, "P1"),
    Sample("c", 0, 1, "P2"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "classification.csv"


def simple_table(classes_of_cases: list[int], patients: list[int] | None = None) -> ClassTable:
    patients = list(range(len(classes_of_cases))) if patients is None else patients
    samples = [Sample(f"c{i:03d}", c, None, f"p{p}") for i, (c, p) in enumerate(zip(classes_of_cases, patients, strict=True))]
    return ClassTable(tuple(f"class {c}" for c in range(max(classes_of_cases) + 1)), tuple(samples))


# --- the file ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\ufeff" + TABLE,
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\n\n") + ",,,\n",
        TABLE.replace(",", " , "),
        TABLE.replace("case,class", "Case,Class"),
        TABLE.replace("benign", '"benign"'),
        "\n".join(",".join([*line.split(",")[::-1], "note"]) for line in TABLE.splitlines()),
    ],
    ids=["as is", "mark", "semicolons", "tabs", "CRLF", "blank lines", "spaces", "capitals", "quotes", "order and a column more"],
)
def test_spellings_of_one_table_are_one_table(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    assert read_class_table(path) == ClassTable(("benign", "malignant"), SAMPLES)


def test_a_table_is_read_as_it_was_written(path: Path) -> None:
    names = ("benign, cystic", 'so-called "x"')
    mixed = ClassTable(names, (*(Sample(f"c;{i}", i, None, f"p {i}") for i in (0, 1)), Sample("d", 0, 3, "p 0")))
    for table in (ClassTable(("benign", "malignant"), SAMPLES), mixed):
        write_class_table(table, path)
        assert read_class_table(path, table.classes) == table
        assert list(path.parent.iterdir()) == [path]


def test_without_further_columns_every_case_is_a_sample_and_a_patient(path: Path) -> None:
    path.write_text("case,class\nx,10\ny,9\n")
    assert read_class_table(path) == ClassTable(("9", "10"), (Sample("x", 1, None, "x"), Sample("y", 0, None, "y")))


def test_names_are_unique_and_tell_the_lesion() -> None:
    assert [sample.name for sample in SAMPLES] == ["a_1", "b_1", "b_2", "c_1"]
    assert Sample("a", 0, None, "a").name == "a"


def test_given_classes_order_the_indices_and_may_have_no_sample(path: Path) -> None:
    path.write_text("case,class\nx,low\ny,high\n")
    table = read_class_table(path, ["low", "middle", "high"])
    assert table.classes == ("low", "middle", "high") and [sample.class_index for sample in table.samples] == [0, 2]


def test_samples_of_cases() -> None:
    table = ClassTable(("benign", "malignant"), SAMPLES)
    assert table.of(["c", "b", "unknown"]) == SAMPLES[1:]
    assert table.only(["a"]) == ClassTable(table.classes, SAMPLES[:1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; expected columns case,class"),
        ("case,class\n", "no row below the header"),
        ("name,class\na,x\n", "no column case among name, class"),
        ("case,class,case\na,x,b\n", "column case twice"),
        ("case,class\na,x\nb,\n", r"line 3: class is empty \(b\)"),
        ("case,class\na,x\n,y\n", "line 3: case is empty"),
        ("case,class,patient\na,x,P\nb,y,\n", "line 3: patient is empty"),
        ("case,class\na,x\nb,y,z\n", "line 3 has 3 values, the header 2"),
        ("case,class\na,x\nb,y\na,x\n", "lines 2 and 4 are both about a;"),
        ("case,class,mask_label\na,x,2\na,y,2\n", "lines 2 and 3 are both about a, mask_label 2"),
        ("case,class,mask_label\na,x,\na,y,2\n", "whole mask and one for a mask_label"),
        ("case,class,mask_label\na,x,0\nb,y,\n", "mask_label is '0'"),
        ("case,class,mask_label\na,x,1.0\nb,y,\n", r"mask_label is '1\.0'"),
        ("case,class,mask_label,patient\na,x,1,P\na,y,2,Q\n", "a is of patient P and of Q"),
        ("case,class,mask_label\na,x,1\na_1,y,\n", "a_1 is a case and a lesion of a"),
        ("case,class\na,x\nb,x\n", "one class only, x"),
        ('case,class\na,"x\nb,y\n', "not CSV"),
        ("case,class\na,x\nb,y\nc,NA\n", r"line 4: class is 'NA' \(c\), a word for no value"),
        ("case,class,patient\na,x,P\nb,y,n/a\n", "line 3: patient is empty"),
    ],
)
def test_a_bad_table_is_refused_with_file_and_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        read_class_table(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff\xfe\x00xlsx", "case,class\na,gutartig für\n".encode("latin-1")])
def test_what_is_no_text_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match="save it as CSV"):
        read_class_table(path)


@pytest.mark.parametrize("word", ["NA", "n/a", "nan", "NaN", "None", "null", "-", "?", "<NA>", "N\u200bA", "\ufeffnone"])
def test_a_word_for_no_value_is_a_class_only_where_dataset_json_says_so(path: Path, word: str) -> None:
    path.write_text(f"case,class\na,x\nb,y\nc,{word}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 4: class is .*a word for no value"):
        read_class_table(path)
    assert len(read_class_table(path, ["x", "y", word]).samples) == 3


@pytest.mark.parametrize("twin", ["Benign", "be nign", "benign\u200b", "benign\u200e", "ｂenign"])
def test_classes_that_look_alike_are_refused(path: Path, twin: str) -> None:
    path.write_text(f"case,class\na,benign\nb,malignant\nc,{twin}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"the classes .*{re.escape(ascii(twin))}.* differ only in case"):
        read_class_table(path)
    assert len(read_class_table(path, ["benign", twin, "malignant"]).samples) == 3


def test_one_number_in_two_spellings_is_refused_and_other_numbers_are_not(path: Path) -> None:
    path.write_text("case,class\na,0\nb,1\nc,1.0\n")
    with pytest.raises(UserError, match=r"the classes '1' and '1\.0' differ only"):
        read_class_table(path)
    path.write_text("case,class\na,0\nb,1\nc,10\nd,1.5\n")
    assert len(read_class_table(path).classes) == 4


def test_a_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_class_table(path)


def test_classes_of_dataset_json_are_checked(path: Path) -> None:
    path.write_text("case,class\na,x\nb,y\n")
    with pytest.raises(UserError, match=r"line 3: unknown class 'y'.*has x, z"):
        read_class_table(path, ["x", "z"])
    for classes in ("xy", ["x"], ["x", "y", "x"]):
        with pytest.raises(UserError, match='"classes"'):
            read_class_table(path, classes)


# --- splits ------------------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> ClassTable:
    """Patients have one to four cases, cases one or two lesions."""
    samples = []
    for patient in range(draw(st.integers(10, 25))):
        for case in range(draw(st.integers(1, 4))):
            labels = draw(st.sampled_from([(None,), (1,), (1, 2)]))
            samples += [Sample(f"{patient:02d}_{case}", draw(st.integers(0, 2)), label, f"p{patient}") for label in labels]
    return ClassTable(("x", "y", "z"), tuple(samples))


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(2, 10), st.integers(0, 3))
def test_folds_hold_each_case_once_and_no_patient_twice(table: ClassTable, num_folds: int, seed: int) -> None:
    folds = stratified_folds(table, num_folds, seed)
    cases = sorted({sample.case for sample in table.samples})
    assert len(folds) == num_folds
    assert sorted(case for fold in folds for case in fold["val"]) == cases
    for fold in folds:
        assert fold["val"] and sorted(fold["train"] + fold["val"]) == cases
        assert not any("patient" in problem for problem in split_problems(table, fold))


@settings(max_examples=20, deadline=None)
@given(tables(), st.integers(1, 23))
def test_repeats_divide_all_cases_and_ten_of_them_test_every_case_once(table: ClassTable, num_repeats: int) -> None:
    splits = repeated_splits(table, num_repeats)
    cases = sorted({sample.case for sample in table.samples})
    assert len(splits) == num_repeats
    for split in splits:
        assert split["val"] and split["test"] and sorted(split["train"] + split["val"] + split["test"]) == cases
        assert not any("patient" in problem for problem in split_problems(table, split))
    for first in range(0, num_repeats - 9, 10):
        assert sorted(case for split in splits[first : first + 10] for case in split["test"]) == cases


@pytest.mark.parametrize(("num_first", "num_second"), [(36, 41), (90, 10), (13, 13), (3, 3)])
def test_one_sample_patients_are_dealt_evenly(num_first: int, num_second: int) -> None:
    table = simple_table([0] * num_first + [1] * num_second)
    for seed in range(5):
        counts = np.array(
            [
                np.bincount([s.class_index for s in table.of(fold["val"])], minlength=2)
                for fold in stratified_folds(table, 5, seed)
            ]
        )
        assert np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 1


def test_patients_with_many_samples_do_not_unbalance_folds() -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 40, 120).tolist()
    table = simple_table((rng.random(120) < 0.25).astype(int).tolist(), patients)
    sizes = [len(fold["val"]) for fold in stratified_folds(table)]
    positives = [sum(s.class_index for s in table.of(fold["val"])) for fold in stratified_folds(table)]
    assert max(Counter(patients).values()) > 4 and np.ptp(sizes) <= 3 and np.ptp(positives) <= 2


def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows() -> None:
    table = simple_table([0, 1] * 12)
    turned = ClassTable(table.classes, table.samples[::-1])
    assert stratified_folds(table) == stratified_folds(turned) != stratified_folds(table, seed=1)
    assert repeated_splits(table) == repeated_splits(turned) != repeated_splits(table, seed=1)
    repeats = repeated_splits(table, 20)
    assert repeats[:10] == repeated_splits(table) and {tuple(s["test"]) for s in repeats[10:]} != {
        tuple(s["test"]) for s in repeats[:10]
    }


def test_too_few_patients_are_refused() -> None:
    table = simple_table([0, 1] * 6, [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3])
    with pytest.raises(UserError, match=r"4 patients .* 5 parts"):
        stratified_folds(table)
    assert len(stratified_folds(table, 4)) == 4
    with pytest.raises(UserError, match="10 parts"):
        repeated_splits(table)


def test_problems_of_a_split_are_named() -> None:
    table = ClassTable(
        ("x", "y", "z"),
        (Sample("a", 0, None, "P"), Sample("b", 1, None, "P"), Sample("c", 2, None, "Q"), Sample("d", 1, None, "R")),
    )
    assert split_problems(table, {"train": ["a", "b", "c"], "val": ["d", "c2"]}) == ["val has one class only, y"]
    assert split_problems(table, {"train": ["a", "d"], "val": ["b", "c"]}) == [
        "train has no sample of z",
        "patient P is in train and val",
    ]
    assert split_problems(table, {"train": ["a", "b", "c", "d"], "val": [], "test": ["unknown"]}) == [
        "val has no case with a class",
        "test has no case with a class",
    ]
    whole = ClassTable(("x", "y"), (*table.samples[:2], Sample("e", 0, None, "S"), table.samples[3]))
    assert split_problems(whole, {"train": ["a", "b"], "val": ["e", "d"]}) == []


# --- a dataset ---------------------------------------------------------------------------------------------------------------

NAME = "Dataset001_Tiny"
CASES = [f"c{i:02d}" for i in range(12)]
DATASET_JSON = {"channel_names": {"0": "T1w", "1": "T2w"}, "labels": {"background": 0, "tumor": 1}, "file_ending": ".nii.gz"}


@pytest.fixture
def raw(nnunet_folders: NnunetFolders) -> Path:
    """Twelve training cases of two classes and a test case, with masks of 2 x 3 x 4 voxels of 1 x 1 x 1 mm."""
    folder = nnunet_folders.raw / NAME
    for name in ("labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    (nnunet_folders.preprocessed / NAME).mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for case in CASES:
        write_mask(folder, case)
    (folder / "imagesTs" / "test_0000.nii.gz").touch()
    write_rows(folder, [f"{case},{'xy'[i % 2]},P{i}" for i, case in enumerate(CASES)])
    return folder


def write_mask(folder: Path, case: str, value: int = 1) -> None:
    mask = np.zeros((6, 7, 8), dtype=np.uint8)
    mask[1:3, 1:4, 1:5] = value
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / "labelsTr" / f"{case}.nii.gz"))


def write_rows(folder: Path, rows: list[str]) -> None:
    (folder / "classification.csv").write_text("\n".join(["case,class,patient", *rows, ""]))


def add_row(folder: Path, row: str) -> None:
    with (folder / "classification.csv").open("a") as stream:
        stream.write(row + "\n")


def test_training_takes_the_rows_of_its_cases_and_folds_by_class(raw: Path, nnunet_folders: NnunetFolders) -> None:
    add_row(raw, "test,y,Q")
    table = take_class_table(NAME, DATASET_JSON)
    folder = nnunet_folders.preprocessed / NAME
    assert table is not None and table == read_class_table(folder / "classification.csv")
    assert [sample.case for sample in table.samples] == CASES
    folds = json.loads((folder / "splits_final.json").read_text())
    assert len(folds) == 5 and not any(split_problems(table, fold) for fold in folds)
    add_row(raw, "stranger,y,R")
    take_class_table(NAME, DATASET_JSON)
    assert "stranger" in (folder / "classification.csv").read_text()


def test_the_order_of_classes_is_chosen_in_the_raw_dataset_json(raw: Path, nnunet_folders: NnunetFolders) -> None:
    copy = nnunet_folders.preprocessed / NAME / "dataset.json"
    table = take_class_table(NAME, DATASET_JSON)
    assert table is not None and table.classes == ("x", "y") and not copy.exists()
    (raw / "dataset.json").write_text(json.dumps({**DATASET_JSON, "classes": ["y", "x"]}))
    turned = take_class_table(NAME, DATASET_JSON)
    assert turned is not None and turned.classes == ("y", "x")
    # where the trainer takes it from
    assert json.loads(copy.read_text()) == {**DATASET_JSON, "classes": ["y", "x"]}
    assert [1 - sample.class_index for sample in turned.samples] == [sample.class_index for sample in table.samples]


def test_which_class_is_positive_is_told_with_the_way_to_change_it() -> None:
    said = told_order(("benign", "malignant"))
    assert said.startswith("malignant counts as positive") and '"classes" in the raw dataset.json' in said
    assert told_order(("a", "b", "c")).startswith("none of 3 classes")


@pytest.mark.parametrize(
    ("num_repeats", "seed", "message"),
    [(-1, 0, "-repeats -1"), (0, 0, "-repeats 0"), (None, -1, "-seed -1"), (3, -1, "-seed -1")],
)
def test_numbers_that_make_no_split_leave_the_splits_alone(
    raw: Path, nnunet_folders: NnunetFolders, num_repeats: int | None, seed: int, message: str
) -> None:
    take_class_table(NAME, DATASET_JSON)
    splits = nnunet_folders.preprocessed / NAME / "splits_final.json"
    before = splits.read_bytes()
    with pytest.raises(UserError, match=message):
        split_dataset("1", num_repeats, seed, overwrite=True)
    assert splits.read_bytes() == before


def test_splits_of_others_are_kept_unless_asked(raw: Path, nnunet_folders: NnunetFolders) -> None:
    take_class_table(NAME, DATASET_JSON)
    with pytest.raises(UserError, match="give --overwrite"):
        split_dataset("1", 10, 0, overwrite=False)
    split_dataset("1", 10, 0, overwrite=True)
    splits = json.loads((nnunet_folders.preprocessed / NAME / "splits_final.json").read_text())
    assert len(splits) == 10 and sorted(case for split in splits for case in split["test"]) == CASES


@pytest.mark.parametrize("num_repeats", [None, 10])
def test_a_visit_without_a_class_is_where_others_of_its_patient_are(
    raw: Path, nnunet_folders: NnunetFolders, num_repeats: int | None
) -> None:
    write_mask(raw, "second_visit")
    write_mask(raw, "stranger")
    (raw / MANIFEST).write_text(json.dumps({"cases": {"second_visit": {"patient": "P3"}}}))
    split_dataset("1", num_repeats, 0, overwrite=True)
    splits = json.loads((nnunet_folders.preprocessed / NAME / "splits_final.json").read_text())
    for split in splits:
        side = {case: where for where, cases in split.items() for case in cases}
        assert side["second_visit"] == side[CASES[3]] and side["stranger"] == "train"
    assert {"val", "train"} <= {where for split in splits for where, cases in split.items() if "second_visit" in cases}


def truncate_mask(raw: Path) -> str:
    path = raw / "labelsTr" / "c03.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    return r"c03: .*c03\.nii\.gz cannot be read"


def empty_mask(raw: Path) -> str:
    write_mask(raw, "c03", value=0)
    return "c03: its mask is empty"


def add_stranger(raw: Path) -> str:
    add_row(raw, "stranger,y,R")
    return "stranger has a class, but no mask"


def share_patient(raw: Path) -> str:
    add_row(raw, "test,y,P3")
    return "patient P3 has training cases and test cases"


@pytest.mark.parametrize("spoil", [truncate_mask, empty_mask, add_stranger, share_patient])
def test_what_is_wrong_with_classes_is_named(raw: Path, spoil) -> None:
    counted, wrong = check_classification(NAME)
    assert not wrong and re.fullmatch(r"\d+ samples of \d+ patients: \d+ x, \d+ y", counted[0])
    assert counted[1] == told_order(("x", "y"))
    message = spoil(raw)
    _, (problem,) = check_classification(NAME)
    assert re.match(message, problem)
    said = [str(finding) for finding in of_classes(NAME)]
    assert re.match(rf"WRONG +classification\.csv +{message}.*\n +-> mend it, or correct .*classification\.csv", said[-1])
    assert len([line for line in said if line.startswith("ok")]) == len(counted)


def test_a_class_table_that_cannot_be_read_is_said_and_one_that_is_not_there_is_not(raw: Path) -> None:
    write_rows(raw, ["c00,x,P0", "c00,y,P0"])
    assert "not usable" in str(*of_classes(NAME))
    write_rows(raw, ["c00,x,P0", "c01,X,P1", "c02,y,P2"])
    assert "differ only in case" in str(*of_classes(NAME))
    (raw / "classification.csv").unlink()
    assert not list(of_classes(NAME))


def test_a_case_without_a_class_is_named(raw: Path) -> None:
    write_mask(raw, "other")
    assert check_classification(NAME)[1] == ["1 cases without a class, left out: other"]


def test_classes_are_counted_by_series() -> None:
    table = simple_table([0, 0, 1, 1, 1])
    records = {
        f"c{i:03d}": SimpleNamespace(series={name: SimpleNamespace(absent=why) for name, why in series.items()})
        for i, series in enumerate([{"T1w": None, "T2w": "all zero"}] * 2 + [{"T1w": "copy of T2w", "T2w": None}] * 2)
    }
    fingerprint: Any = SimpleNamespace(series=("T1w", "T2w"), cases=records)
    assert series_lines(table, fingerprint) == ["T1w: 2 of 2 class 0, 0 of 3 class 1", "T2w: 0 of 2 class 0, 2 of 3 class 1"]
