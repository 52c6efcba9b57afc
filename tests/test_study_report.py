"""A study's tables say what the statistics say, in every format, and its page holds all of it and loads nothing."""

import re

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_csm.study.layout import TableLayout, latex
from nnunet_csm.study.report import CaseFiles, write_report
from nnunet_csm.study.statistics import AVERAGE, Contrast
from nnunet_csm.study.tables import make_tables, mean_and_sd, p_text, points, share_of_labels

NAN = float("nan")
NONE = pd.DataFrame()
ARMS = {"Scratch": 0.5, "MAE3D": 0.6, "CSM_100% & more": 0.7}
PARTS = ("FLAIR", "T1w", "FLAIR+T1w")


def study(structures=("WT", "ET"), shares=(1.0, 0.1), tested=("all",), num_repeats=3, table="Gliomas"):
    """Dice that falls with fewer labels, with noise."""
    rng = np.random.default_rng(0)
    rows = [
        (table, arm, share, round(50 * share), repeat, "all", series, f"c{p}", f"p{p}", structure, dice * share**0.1 + noise, "")
        for arm, dice in ARMS.items()
        for share in shares
        for repeat in range(num_repeats)
        for series in tested
        for p in range(8)
        for structure in structures
        for noise in rng.normal(0, 0.05, 1)
    ]
    columns = "table arm labels num_labelled repeat finetuned tested case patient structure dice prediction"
    return pd.DataFrame(rows, columns=columns.split())


def costs():
    rows = [
        ("pre", "pretraining", "CSM_100% & more", share, 0, 600.0, 20.0, 300_000, 432.0, np.nan, "NVIDIA H200", "p")
        for share in (1.0, 0.1)
    ]
    rows += [(f"ft{share}", "fine-tuning", arm, share, 0, 120.0, 8.0, 9, 0.0, 0.25, "NVIDIA H200", "p")
             for arm in ARMS for share in (1.0, 0.1)]  # fmt: skip
    columns = "run kind arm labels repeat seconds peak_memory_gb num_crops visible_tokens encoder_share device plans"
    return pd.DataFrame(rows, columns=columns.split())


def layout_of(tables, name) -> TableLayout:
    (found,) = [layout for layout in tables.layouts if layout.name == name]
    return found


def header(layout):
    return tuple(layout.cells)


def rows(layout):
    return list(layout.cells.itertuples(index=False, name=None))


def best(layout):
    """(row, column) of the best values."""
    return set(zip(*map(np.ndarray.tolist, np.nonzero(layout.best)), strict=True))


def layout(table, name, caption, columns, texts, num_text, marked=(), blocks=(0,)):
    bold = np.zeros((len(texts), len(columns)), bool)
    for place in marked:
        bold[place] = True
    return TableLayout(table, name, caption, pd.DataFrame(texts, columns=list(columns)), num_text, bold, blocks)


def test_rows_and_columns_are_the_papers():
    tables = make_tables(study(), NONE, NONE)
    found = layout_of(tables, "Dice")
    assert header(found) == ("Method", "Labels (cases)", AVERAGE, "WT", "ET")
    assert [row[:2] for row in rows(found)] == [(arm, labels) for labels in ("100 % (50)", "10 % (5)") for arm in ARMS]
    assert all(re.fullmatch(r"0\.\d{4} ± 0\.\d{3}", cell) for row in rows(found) for cell in row[2:])
    assert best(found) == {(row, column) for row in (2, 5) for column in (2, 3, 4)} and found.blocks == (0, 3)
    summary = tables.summary.set_index(["arm", "labels", "structure"]).loc[("MAE3D", 0.1, "ET")]
    assert rows(found)[4][4] == mean_and_sd(summary["mean"], summary["sd"])


def test_one_structure_stands_under_the_series():
    single = study(("lesion",), (1.0,), tested=("FLAIR", "T1w"))
    single["finetuned"] = single["tested"]
    found = layout_of(make_tables(pd.concat([study(("lesion",), (1.0,)), single]), NONE, NONE), "Dice")
    assert header(found) == ("Method", "all series", "FLAIR", "T1w", "mean of single series")
    assert len(rows(found)) == 3 and all("–" not in cell for row in rows(found) for cell in row)


def test_parts_of_the_series_are_rows_with_dots():
    tables = make_tables(study(shares=(0.1,), tested=("all", "T1w", "FLAIR")), NONE, NONE)
    found = layout_of(tables, f"subsets {AVERAGE} 10")
    assert header(found) == ("T1w", "FLAIR", *ARMS)
    assert [row[:2] for row in rows(found)] == [("●", "○"), ("○", "●"), ("●", "●"), ("mean", "")]
    assert [row[:1] for row in rows(layout_of(tables, "Dice"))] == [(arm,) for arm in ARMS]
    values = np.array([[float(cell.split()[0]) for cell in row[2:]] for row in rows(found)])
    assert values[3] == pytest.approx(values[:3].mean(0), abs=1e-4)
    assert {column for row, column in best(found) if row == 3} == {4}
    # corrected apart from the comparisons with all series
    assert [layout_of(tables, name).caption.count("6 tests") for name in ("comparisons", "comparisons of parts")] == [1, 0]


def test_comparisons_are_with_the_baseline_and_those_asked_for():
    tables = make_tables(study(shares=(1.0,)), NONE, NONE, "MAE3D", [Contrast("CSM_100% & more", "Scratch")])
    found = layout_of(tables, "comparisons")
    assert list(found.cells["Comparison"].unique()) == [
        "Scratch − MAE3D",
        "CSM_100% & more − MAE3D",
        "CSM_100% & more − Scratch",
    ]
    assert found.cells["Points"][0].startswith("−") and found.cells["Points"][3].startswith("+")


def test_a_pretraining_counts_once_for_all_shares_of_labels():
    found = layout_of(make_tables(study(), NONE, costs()), "cost")
    pretrainings = [row for row in rows(found) if row[1] == "pretraining"]
    assert [row[2:8] for row in pretrainings] == [("–", "1", "10.0", "20.0", "300,000", "432")]
    assert len(rows(found)) == 7 and {row[7] for row in rows(found) if row[1] == "fine-tuning"} == {"–"}


def test_numbers_as_they_are_read():
    assert mean_and_sd(0.83449, 0.0071) == "0.8345 ± 0.007" and mean_and_sd(0.5, NAN) == "0.5000" and mean_and_sd(NAN, NAN) == "–"
    assert points(-0.0312) == "−3.12" and points(0.05) == "+5.00" and points(NAN) == "–"
    assert p_text(0.0004) == "< 0.001" and p_text(0.0312) == "0.031"
    assert share_of_labels(0.1, 5, 6) == "10 % (5–6)"


def test_markdown_has_as_many_cells_in_every_row():
    text = make_tables(study(), NONE, costs()).to_markdown()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1
    assert "**0.6" in text or "**0.7" in text


def test_latex_is_balanced_and_escaped():
    tables = make_tables(study(tested=("all", "FLAIR", "T1w"), table="50_% {x} ^~\\ #1 $"), NONE, costs())
    text = tables.to_latex()
    body = text.split("\n", 1)[1]
    for begin in ("table", "tabular"):
        assert body.count(rf"\begin{{{begin}}}") == body.count(rf"\end{{{begin}}}") == len(tables.layouts)
    unescaped = re.sub(r"\\[%&_#${}\\]", "", body)
    assert unescaped.count("{") == unescaped.count("}") and unescaped.count("$") % 2 == 0
    assert not re.search(r"[%#_]", unescaped) and body.isascii()
    for tabular in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", body, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
        assert rows and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(tabular[0]) - 1}
    labels = re.findall(r"\\label\{(.*)\}", body)
    assert len(set(labels)) == len(labels)
    assert latex("a_b & 5 %") == r"a\_b \& 5 \%"


def test_details_that_all_rows_share_stand_in_the_caption():
    texts = [("a − b", "all", "10 %", "1.00"), ("c − b", "all", "100 %", "2.00")]
    whole = layout("t", "n", "Differences", ("Comparison", "Series", "Labels", "Points"), texts, 3, [(1, 3)])
    brief = whole.brief("Series", "Labels")
    assert header(brief) == ("Comparison", "Labels", "Points") and brief.caption == "Differences. Series: all"
    assert rows(brief) == [("a − b", "10 %", "1.00"), ("c − b", "100 %", "2.00")]
    assert brief.num_text == 2 and best(brief) == {(1, 2)}
    for text in (brief.to_markdown(), brief.to_latex(), brief.to_page().caption):
        assert "Series: all" in text
    one = layout("t", "n", "Differences", ("Comparison", "Series"), [("a − b", "all")], 2)
    assert one.brief("Series") is one


def test_details_beside_blocks_numbers_and_best_values():
    texts = [("CSM", "0.7", "64 × 3"), ("MAE3D", "0.6", "64 × 3"), ("CSM", "0.5", "64 × 3")]
    columns = ("Method", "Dice", "Patients × repeats")
    brief = layout("t", "n", "Dice", columns, texts, 1, [(0, 1), (0, 2)], (0, 2)).brief("Patients × repeats")
    assert brief.caption == "Dice. Patients × repeats: 64 × 3" and header(brief) == ("Method", "Dice")
    assert brief.num_text == 1 and best(brief) == {(0, 1)} and brief.blocks == (0, 2)
    page = brief.to_page()
    assert tuple(page.cells) == header(brief) and page.best.shape == page.cells.shape
    assert brief.to_latex().count(r"\midrule") == 2
    none = layout("t", "n", "Dice", columns, [], 1)
    assert none.brief("Dice") is none and r"\toprule" in none.to_latex()


def test_latex_headings_are_in_lines_and_wide_tables_are_scaled():
    columns, cells = ("Method", "Visible tokens a crop"), ("x", "1.0")
    text = layout("", "cost", "Cost", columns, [cells], 1).to_latex()
    assert r"\shortstack[r]{Visible\\tokens\\a crop}" in text
    scaled = re.search(r"\\begin\{adjustbox\}\{max width=\\linewidth\}\n\\begin\{tabular\}\{lr\}", text)
    assert scaled and text.index(r"\end{tabular}") < text.index(r"\end{adjustbox}")
    # what would be an option of the line's end before it
    assert r"& Dice {[}mm]" in layout("", "n", "c", ("Method", "Dice [mm]"), [("x", "0.123456789")], 1).to_latex()


def test_bars_in_names_part_no_columns():
    text = layout("", "n", "c", ("Method", "a|b"), [("x|y", "1.0")], 1).to_markdown()
    assert r"x\|y" in text and r"a\|b" in text and len(re.findall(r"(?<!\\)\|", text.splitlines()[-1])) == 3


def test_files_hold_what_the_tables_hold(tmp_path):
    tables = make_tables(study(), NONE, costs())
    tables.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.csv", "comparisons.csv", "costs_by_arm.csv", "tables.md", "tables.tex"
    }  # fmt: skip
    read = pd.read_csv(tmp_path / "summary.csv")
    assert np.allclose(read["mean"], tables.summary["mean"]) and list(read["arm"]) == list(tables.summary["arm"])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_tables(study(), NONE, costs()).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def test_the_page_holds_every_table_and_picture_and_no_link(tmp_path):
    rng = np.random.default_rng(0)
    results = study()
    for case in dict.fromkeys(results["case"]):
        write(tmp_path / "raw" / "images" / f"{case}_0001.nii.gz", rng.normal(50, 9, (5, 24, 20)).astype(np.float32))
        reference = np.zeros((5, 24, 20), np.uint8)
        reference[2:4, 5:12, 6:14] = 1
        write(tmp_path / "raw" / "labels" / f"{case}.nii.gz", reference)
        write(tmp_path / "study" / "runs" / f"{case}.nii.gz", np.roll(reference, 1, 1))
    # predictions of one of the shares of labels were kept, of another they are gone
    results["prediction"] = "runs/" + results["case"] + np.where(results["labels"] == 1.0, ".nii.gz", "-gone.nii.gz")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "rebuilt.png")
    page = write_report(
        tmp_path / "study",
        "A <study>",
        results,
        NONE,
        costs(),
        cases=CaseFiles(tmp_path / "raw" / "images", tmp_path / "raw" / "labels", 1, {1: "tumour"}),
        pictures=[(tmp_path / "rebuilt.png", "a rebuilt series")],
    )
    html = page.read_text(encoding="utf-8")
    layouts = make_tables(results, NONE, costs()).layouts
    assert html.count("<table>") == len(layouts) and html.count("<img") == 4
    assert {path.name for path in (page.parent / "figures").iterdir()} == {"labels_1.png", "patients_1.png", "case_1.png"}
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|url\(""", html)
    assert "A &lt;study&gt;" in html and "CSM_100% &amp; more" in html and "a rebuilt series" in html
    assert html.count('class="best"') == sum(layout.best.sum() for layout in layouts) > 0


def test_what_is_missing_has_no_section(tmp_path):
    page = write_report(tmp_path, "t", study(shares=(1.0,), num_repeats=1), NONE, NONE)
    titles = re.findall(r"<h2>(.*)</h2>", page.read_text(encoding="utf-8"))
    assert titles == ["Gliomas", "Patient by patient", "How this was computed"]


def test_a_study_of_classes_has_tables_too(tmp_path):
    rng = np.random.default_rng(0)
    table = study(("x",), (1.0, 0.1)).drop(columns=["structure", "dice", "prediction"]).assign(mask_label="")
    table["class"] = np.where(table["case"].isin(["c0", "c1", "c2"]), "II", "III")
    table["p_III"] = np.clip(rng.normal(0.4, 0.2, len(table)) + 0.2 * (table["class"] == "III"), 0, 1)
    table["p_II"] = 1 - table["p_III"]
    tables = make_tables(NONE, table, NONE)
    assert header(layout_of(tables, "AUC")) == ("Method", "Labels (cases)", "AUC")
    assert [layout.name for layout in tables.layouts] == ["AUC", "comparisons"]
    page = write_report(tmp_path, "t", NONE, table, NONE)
    assert re.findall(r"<h2>(.*)</h2>", page.read_text(encoding="utf-8")) == [
        "Gliomas",
        "Label efficiency",
        "How this was computed",
    ]


def test_of_numbers_the_smallest_error_is_best_and_differences_have_their_unit(tmp_path):
    rng = np.random.default_rng(0)
    table = study(("x",), (1.0, 0.1), tested=("all", "FLAIR", "T1w")).drop(columns=["structure", "dice", "prediction"])
    table = table.assign(mask_label="", value=50.0)
    errors = table["arm"].map({"Scratch": 12.0, "MAE3D": 9.0, "CSM_100% & more": 3.0})
    table["predicted"] = table["value"] + errors + rng.normal(0, 0.1, len(table))
    tables = make_tables(NONE, table, NONE)
    main = layout_of(tables, "MAE")
    assert header(main)[-1] == "MAE" and [main.cells["Method"][row] for row in np.flatnonzero(main.best.any(1))] == [
        "CSM_100% & more",
        "CSM_100% & more",
    ]
    of_parts = layout_of(tables, "subsets MAE 100")
    assert of_parts.best[:, -1].all() and not of_parts.best[:, :-1].any() and ": MAE with a part" in of_parts.caption
    compared = layout_of(tables, "comparisons")
    assert "of the MAE, below 0 is better" in compared.caption and "Points" not in header(compared)
    assert compared.cells["Difference"].str.match(r"−[239]\.").all()
    page = write_report(tmp_path, "t", NONE, table, NONE).read_text(encoding="utf-8")
    assert "MAE over the number of labelled training cases" in page and "Dice &lt; 0.1" not in page


def test_a_study_whose_baseline_is_not_done_yet_has_no_comparisons(tmp_path):
    results = study()
    page = write_report(tmp_path, "t", results[results["arm"] != "Scratch"], NONE, NONE, baseline="Scratch")
    assert re.findall(r"<h2>(.*)</h2>", page.read_text(encoding="utf-8")) == [
        "Gliomas",
        "Label efficiency",
        "How this was computed",
    ]
    assert pd.read_csv(tmp_path / "comparisons.csv").empty
