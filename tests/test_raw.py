"""Series names resolve to one name whatever their spelling; a raw folder with a hole in it is refused with the file's name."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from nnunet_csm.errors import UserError
from nnunet_csm.nnunet import channel_names
from nnunet_csm.raw.check import check_dataset, check_inputs, load_dataset_json
from nnunet_csm.raw.series import SeriesMatch, alias_table, canonical_series, parse_aliases

CHANNEL_NAMES = {"0": "FLAIR", "1": "T1w", "2": "T1ce"}
NAMES = list(CHANNEL_NAMES.values())
SHAPE = (3, 5, 4)
SPACING = (4.0, 1.0, 2.0)


# --- names -------------------------------------------------------------------------------------------------------------------


def test_no_alias_belongs_to_two_series() -> None:
    spellings = [
        (name.casefold().replace(" ", ""), canonical)
        for canonical, aliases in alias_table().items()
        for name in (canonical, *aliases)
    ]
    assert len(dict(spellings)) == len(spellings)


@given(st.data())
def test_case_spaces_underscores_and_hyphens_do_not_count(data: st.DataObject) -> None:
    canonical = data.draw(st.sampled_from(sorted(alias_table())))
    alias = data.draw(st.sampled_from([canonical, *alias_table()[canonical]]))
    separators = st.sampled_from(["", " ", "_", "-", " - "])
    respelled = "".join(
        data.draw(st.sampled_from([letter.upper(), letter.lower()])) + data.draw(separators) for letter in alias if letter != " "
    )
    assert canonical_series([respelled]) == [SeriesMatch(respelled, canonical, known=True)]


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["FLAIR", "T1w", "t1gd", "T2w"], ["FLAIR", "T1w", "T1ce", "T2w"]),  # MSD Task01
        (["t1c", "t1n", "t2f", "t2w"], ["T1ce", "T1w", "FLAIR", "T2w"]),  # BraTS 2023
        (["T2W", "ADC", "HBV"], ["T2w", "ADC", "DWI"]),  # PI-CAI
        (["T1-weighted post contrast", "T2*"], ["T1ce", "T2starw"]),
    ],
)
def test_names_of_public_datasets(given_names: list[str], expected: list[str]) -> None:
    assert [match.canonical for match in canonical_series(given_names)] == expected


def test_an_unknown_name_is_kept_and_marked() -> None:
    assert canonical_series(["T2", "Ktrans map"])[1] == SeriesMatch("Ktrans map", "Ktrans map", known=False)


def test_a_mapping_is_read_by_channel_number_not_by_its_order() -> None:
    names = {str(channel): f"series {channel}" for channel in range(12)}
    shuffled = {key: names[key] for key in sorted(names)}  # "0", "1", "10", "11", "2", ...
    assert channel_names({"channel_names": shuffled}) == list(names.values())


@pytest.mark.parametrize("names", [{"0": "T1", "2": "T2"}, {}, {"0": "T1", "1": "  "}, {"a": "T1"}])
def test_bad_channel_names_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"dataset\.json"):
        canonical_series(channel_names({"channel_names": names}))


def test_two_channels_of_one_series_are_refused_and_the_remedy_works() -> None:
    with pytest.raises(UserError, match=r"channels 0 \('T2'\) and 2 \('t2_tse'\).*'T2w'.*-series_alias 't2_tse=NAME'"):
        canonical_series(["T2", "ADC", "t2_tse"])
    remedied = canonical_series(["T2", "ADC", "t2_tse"], parse_aliases(["t2_tse=T2w_coronal"]))
    assert [match.canonical for match in remedied] == ["T2w", "ADC", "T2w_coronal"]
    assert all(match.known for match in remedied)


def test_two_channels_with_the_very_same_name_need_dataset_json() -> None:
    with pytest.raises(UserError, match=r"dataset\.json"):
        canonical_series(["MRI", "MRI"])


def test_an_alias_spelled_as_one_channel_leaves_the_other_alone() -> None:
    matches = canonical_series(["T2", "t2"], {"t2": "T2w_coronal"})
    assert [match.canonical for match in matches] == ["T2w", "T2w_coronal"]


def test_an_alias_wins_over_the_table_and_may_name_the_series_in_any_spelling() -> None:
    assert canonical_series(["scan a", "T1"], {"Scan_A": "T2", "T1": "t1gd"}) == [
        SeriesMatch("scan a", "T2w", known=True),
        SeriesMatch("T1", "T1ce", known=True),
    ]


def test_an_alias_that_fits_no_channel_is_refused() -> None:
    with pytest.raises(UserError, match=r"no channel is called 'T3'.*T1, T2"):
        canonical_series(["T1", "T2"], {"T3": "T1ce"})


@pytest.mark.parametrize("flag", ["", "=", "T1", "T1=", "=T1w", "  = T1w"])
def test_a_malformed_alias_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match="GIVEN=NAME"):
        parse_aliases([flag])


def test_parse_aliases() -> None:
    assert parse_aliases([]) == {}
    assert parse_aliases(["T1 axial = T1w", "a=b=c", "a=b=c"]) == {"T1 axial": "T1w", "a=b": "c"}
    with pytest.raises(UserError, match="twice"):
        parse_aliases(["a=T1w", "a=T2w"])


# --- files -------------------------------------------------------------------------------------------------------------------


def write_volume(
    path: Path, shape: tuple[int, ...] = SHAPE, spacing: tuple[float, ...] = SPACING, origin: tuple[float, ...] = (0.0, 0.0, 0.0)
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.zeros(shape, dtype=np.uint8), isVector=False)
    if len(shape) == 3:
        image.SetSpacing(spacing[::-1])
        image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A correct dataset of two cases with three series."""
    folder = tmp_path / "Dataset001_Phantom"
    for case in ("a", "b_0001"):
        for channel in CHANNEL_NAMES:
            write_volume(folder / "imagesTr" / f"{case}_000{channel}.nii.gz")
        write_volume(folder / "labelsTr" / f"{case}.nii.gz")
    dataset_json = {
        "channel_names": CHANNEL_NAMES,
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def test_a_correct_dataset_passes(dataset: Path) -> None:
    (line,) = check_dataset(dataset)
    assert "2 cases" in line and "files of FLAIR, T1w, T1ce (" in line and line.endswith("and a label")
    assert check_dataset(dataset, load_dataset_json(dataset)) == [line]
    (line,) = check_inputs(dataset / "imagesTr", NAMES, ".nii.gz")
    assert "2 cases" in line and "label" not in line


def test_what_may_be_a_mistake_is_told_and_passes(dataset: Path) -> None:
    write_volume(dataset / "imagesTr" / "a_0001.nii.gz", origin=(0.0, 30.0, 40.0))
    dataset_json = {**load_dataset_json(dataset), "numTraining": 7}
    _, shifted, miscounted = check_dataset(dataset, dataset_json)
    assert "a_0001.nii.gz" in shifted and "50.0 mm" in shifted
    assert "numTraining is 7" in miscounted and "2 cases" in miscounted


def test_a_missing_series_is_named_with_its_remedy(dataset: Path) -> None:
    (dataset / "imagesTr" / "a_0002.nii.gz").unlink()
    for check in (lambda: check_dataset(dataset), lambda: check_inputs(dataset / "imagesTr", NAMES, ".nii.gz")):
        with pytest.raises(
            UserError, match=r"imagesTr/a_0002\.nii\.gz is missing: the T1ce of case a; .*all-zero volume"
        ) as caught:
            check()
        assert "more" not in str(caught.value)


def test_the_remedy_for_a_missing_series_passes(dataset: Path) -> None:
    (dataset / "imagesTr" / "a_0002.nii.gz").unlink()
    write_volume(dataset / "imagesTr" / "a_0002.nii.gz")
    assert len(check_dataset(dataset)) == 1


def test_further_problems_are_counted(dataset: Path) -> None:
    for name in ("imagesTr/a_0001.nii.gz", "imagesTr/b_0001_0000.nii.gz", "imagesTr/b_0001_0002.nii.gz", "labelsTr/a.nii.gz"):
        (dataset / name).unlink()
    with pytest.raises(UserError, match=r"a_0001\.nii\.gz is missing.*\(and 3 more\)$"):
        check_dataset(dataset)


def test_a_missing_label_is_named(dataset: Path) -> None:
    (dataset / "labelsTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"labelsTr/b_0001\.nii\.gz is missing"):
        check_dataset(dataset)
    assert check_inputs(dataset / "imagesTr", NAMES, ".nii.gz")


@pytest.mark.parametrize("name", ["imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"])
def test_another_shape_names_both_files_and_shapes(dataset: Path, name: str) -> None:
    write_volume(dataset / name, shape=(3, 4, 5))
    with pytest.raises(UserError, match=rf"{name} has the shape \(3, 4, 5\), but .*a_0000\.nii\.gz has \(3, 5, 4\)"):
        check_dataset(dataset)


def test_another_spacing_names_both_files_and_spacings(dataset: Path) -> None:
    write_volume(dataset / "imagesTr" / "a_0001.nii.gz", spacing=(4.0, 1.0, 1.0))
    with pytest.raises(
        UserError, match=r"a_0001\.nii\.gz has the spacing \(4\.0, 1\.0, 1\.0\), but .*a_0000\.nii\.gz has \(4\.0, 1\.0, 2\.0\)"
    ):
        check_dataset(dataset)


def test_an_unsplit_file_of_all_series_is_refused(dataset: Path) -> None:
    write_volume(dataset / "imagesTr" / "a_0000.nii.gz", shape=(3, *SHAPE))
    with pytest.raises(UserError, match=r"a_0000\.nii\.gz has the shape .*nnUNetv2_convert_MSD_dataset"):
        check_dataset(dataset)


def test_a_broken_file_is_named(dataset: Path) -> None:
    (dataset / "imagesTr" / "a_0001.nii.gz").write_bytes(b"half a copy")
    with pytest.raises(UserError, match=r"a_0001\.nii\.gz cannot be read"):
        check_dataset(dataset)


def test_directions_that_itk_refuses_are_read_as_nnunet_does(dataset: Path) -> None:
    sheared = np.diag([2.0, 1.0, 4.0, 1.0])
    sheared[0, 1] = 0.3
    for path in (dataset / "imagesTr").glob("a_*"):
        image = nibabel.Nifti1Image(np.zeros(SHAPE[::-1], dtype=np.uint8), sheared)
        image.header.set_zooms(SPACING[::-1])
        image.set_sform(sheared, code=1)
        image.set_qform(None, code=0)
        nibabel.save(image, path)
    assert len(check_dataset(dataset)) == 1


@pytest.mark.parametrize(("name", "message"), [("a_0003.nii.gz", "0002 T1ce; rename it"), ("c.nii.gz", "CASE_0000")])
def test_a_file_that_is_no_series_is_refused(dataset: Path, name: str, message: str) -> None:
    write_volume(dataset / "imagesTr" / name)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        check_dataset(dataset)


def test_images_without_labels_are_checked_as_images(dataset: Path) -> None:
    shutil.rmtree(dataset / "labelsTr")
    described = json.loads((dataset / "dataset.json").read_text())
    lines = check_dataset(dataset, {**described, "labels": {}})
    assert "2 cases" in lines[0] and "a label" not in lines[0] and "no labels" in lines[1]


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b nothing", b"abc"])
def test_a_broken_file_is_named_whatever_is_in_it(dataset: Path, content: bytes) -> None:
    (dataset / "imagesTr" / "a_0001.nii.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"a_0001\.nii\.gz (is empty|cannot be read)"):
        check_dataset(dataset)


@pytest.mark.parametrize("name", ["dataset.json", "imagesTr", "labelsTr"])
def test_a_missing_part_of_the_folder_is_named(dataset: Path, name: str) -> None:
    (dataset / name).rename(dataset / "elsewhere")
    with pytest.raises(UserError, match=rf"{name}(: no such file| is missing)"):
        check_dataset(dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"modality": {"0": "MRI"}}', "nnUNetv2_convert_MSD_dataset"),
        ('{"channel_names": {"0": "MRI"}, "labels": {}}', "no 'file_ending'"),
    ],
)
def test_a_bad_dataset_json_is_refused(dataset: Path, content: str, message: str) -> None:
    (dataset / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message):
        check_dataset(dataset)


def test_cases_listed_in_dataset_json_are_checked_where_they_lie(dataset: Path) -> None:
    dataset_json = load_dataset_json(dataset)
    images = [f"./imagesTr/a_000{channel}.nii.gz" for channel in CHANNEL_NAMES]
    dataset_json["dataset"] = {"first": {"images": images, "label": "labelsTr/a.nii.gz"}}
    assert len(check_dataset(dataset, dataset_json)) == 1
    (dataset / "imagesTr" / "a_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"a_0001\.nii\.gz is missing: the T1w of case first"):
        check_dataset(dataset, dataset_json)


def test_an_input_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        check_inputs(tmp_path / "nowhere", NAMES, ".nii.gz")
    with pytest.raises(UserError, match=r"CASE_0000\.nii\.gz; the folder is empty"):
        check_inputs(tmp_path, NAMES, ".nii.gz")
    (tmp_path / "a_0000.nrrd").touch()
    with pytest.raises(UserError, match=r"CASE_0000\.nii\.gz; found 1 other entries, such as a_0000\.nrrd"):
        check_inputs(tmp_path, NAMES, ".nii.gz")
