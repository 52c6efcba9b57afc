"""`nnunet_csm probe`: tables, predictions and a picture of what embeddings tell, several of them beside each other."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.bootstrap import SEED, estimate_text
from nnunet_csm.evaluation.class_metrics import TITLES as CLASS_TITLES
from nnunet_csm.evaluation.classification import compare, evaluate
from nnunet_csm.evaluation.embeddings import read_embeddings
from nnunet_csm.evaluation.number_metrics import TITLES as NUMBER_TITLES
from nnunet_csm.evaluation.number_metrics import evaluate_numbers
from nnunet_csm.evaluation.probing import PROBES, Fold, Targets, folds_of, predicted, read_targets
from nnunet_csm.evaluation.repeats import PROBABILITY
from nnunet_csm.figures.embeddings import save_embeddings
from nnunet_csm.files import whole_folder, write_text

CLASS_METRICS = ("accuracy", "balanced_accuracy", "auc")
NUMBER_METRICS = ("mae", "r", "r2")
TITLES = {**CLASS_TITLES, **NUMBER_TITLES}
ALL = "all"
# what a probe says of all test cases of all folds, one after the other
Said = Float[np.ndarray, "m ..."]


@dataclass(frozen=True)
class ProbeRequest:
    """What is to be told from which embeddings.

    Attributes:
        embeddings: tables of `embed`; all others are compared with the first.
        targets: CSV, see `read_targets`, which takes the columns.
        output: folder to write.
        num_folds, num_repeats, seed: see `folds_of`.
        overwrite: replace the folder.
    """

    embeddings: tuple[Path, ...]
    targets: Path
    output: Path
    class_column: str | None = None
    value_column: str | None = None
    group_column: str | None = None
    num_folds: int = 5
    num_repeats: int = 5
    seed: int = SEED
    overwrite: bool = False


def probe_embeddings(request: ProbeRequest) -> str:
    """Probe embeddings on the cases that all of them have, and write `probe.md`, `.csv`, `predictions.csv`, `embedding.png`.

    Returns:
        The tables as Markdown.

    Raises:
        UserError: tables that cannot be used or have no case in common, or too few patients.
    """
    names = _names(request.embeddings)
    tables = {name: read_embeddings(path) for name, path in zip(names, request.embeddings, strict=True)}
    columns = request.class_column, request.value_column, request.group_column
    targets, without = read_targets(request.targets, *columns)
    common = sorted(set(targets.table.index).intersection(*(table.index for table in tables.values())))
    if not common:
        found = f"{request.targets} has {targets.table.index[0]} ..., {request.embeddings[0]} {tables[names[0]].index[0]} ..."
        raise UserError(f"{found}: no case is in all of them; give embeddings and targets of the same cases")
    embedded = {case for table in tables.values() for case in table.index}
    notes = _notes(embedded, targets, without, common)
    targets = targets.only(common)
    folds = folds_of(targets, request.num_folds, request.num_repeats, request.seed)
    features = {name: table.loc[common].to_numpy(np.float64) for name, table in tables.items()}
    with whole_folder(request.output, request.overwrite) as folder:
        steps = tqdm([(name, probe) for name in names for probe in PROBES], "probing", disable=None)
        said = {(name, probe): _said(features[name], targets, folds, probe) for name, probe in steps}
        scores, differences = scored(said, targets, folds)
        text = _text(request, targets, [*notes, *_provenance(request.embeddings)], scores, differences)
        write_text(folder / "probe.md", text)
        write_text(folder / "probe.csv", scores.to_csv(index=False))
        if len(names) > 1:
            write_text(folder / "differences.csv", differences.to_csv(index=False))
        write_text(folder / "predictions.csv", _predictions(said, targets, folds, request.num_folds).to_csv(index=False))
        panels = {name: projections(one) for name, one in features.items()}
        labels = [targets.classes[number] for number in targets.table["target"]] if targets.classes else None
        save_embeddings(folder / "embedding.png", panels, targets.table["target"].to_numpy(), targets.column, labels)
    return f"{text}\nwritten to {request.output}"


def _said(features: Float[np.ndarray, "n e"], targets: Targets, folds: Sequence[Fold], probe: str) -> Said:
    return np.concatenate([predicted(features, targets, fold, probe) for fold in folds])


def scored(said: Mapping[tuple[str, str], Said], targets: Targets, folds: Sequence[Fold]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores with intervals over patients, and differences to the first embedding on the same patients.

    Returns:
        Columns embedding, probe, group, num_cases, metric, value, low, high; of differences as well, and baseline. There is no
        row for a group in which a metric is not defined.
    """
    cases = np.concatenate([fold.test for fold in folds])
    run = np.concatenate([np.full(len(fold.test), number) for number, fold in enumerate(folds)])
    table = targets.table.iloc[cases]
    first = next(name for name, _ in said)
    groups = [ALL, *sorted(set(table["group"]) - {""})]
    scores, differences = list[pd.DataFrame](), list[pd.DataFrame]()
    for (name, probe), one in said.items():
        for group in groups:
            chosen = np.flatnonzero((table["group"] == group) | (group == ALL))
            within = table.iloc[chosen]
            given = within["target"].to_numpy(), list(within["patient"]), run[chosen].tolist()
            about = {"embedding": name, "probe": probe, "group": group, "num_cases": within.index.nunique()}
            if name == first:
                (found,) = _estimates(targets, *given, [one[chosen]])
            else:
                _, found, difference = _estimates(targets, *given, [said[first, probe][chosen], one[chosen]])
                differences.append(_rows(difference, about | {"baseline": first}))
            scores.append(_rows(found, about))
    return pd.concat(scores, ignore_index=True), pd.concat(differences or [pd.DataFrame()], ignore_index=True)


def _estimates(
    targets: Targets, values: np.ndarray, patients: list[str], runs: list[int], said: Sequence[Said]
) -> list[pd.DataFrame]:
    """Rows value, low and high, a column a metric: of each set of predictions and, of two, of their difference."""
    if not targets.classes:
        return [one[[*NUMBER_METRICS]] for one in evaluate_numbers(values, said, patients, runs)]
    if len(said) == 1:
        return [evaluate(values, said[0], targets.classes, patients, runs).overall[[*CLASS_METRICS]]]
    both = compare(values, said[0], said[1], targets.classes, patients, runs)
    return [one[[*CLASS_METRICS]] for one in (both.first.overall, both.second.overall, both.difference)]


def _rows(estimates: pd.DataFrame, about: Mapping[str, object]) -> pd.DataFrame:
    rows = estimates.T.rename_axis("metric").reset_index()
    for place, (column, value) in enumerate(about.items()):
        rows.insert(place, column, value)
    return rows.dropna(subset="value")


def projections(features: Float[np.ndarray, "n e"]) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Two coordinates for every case: principal components and, where umap-learn is installed, UMAP."""
    scaled = StandardScaler().fit_transform(features)
    found = {"PCA": PCA(min(2, *scaled.shape)).fit_transform(scaled)}
    if len(scaled) > 3:
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed means one thread
            from umap import UMAP

            found["UMAP"] = UMAP(n_neighbors=min(15, len(scaled) - 1), random_state=SEED).fit_transform(scaled)
    return {name: np.pad(xy, [(0, 0), (0, 2 - xy.shape[1])]) for name, xy in found.items()}


# --- words -------------------------------------------------------------------------------------------------------------------


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: without folder and ending, where that tells them apart."""
    if len(set(paths)) < len(paths):
        raise UserError(f"-i {' '.join(map(str, paths))}: a file is there twice; give each embedding once")
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _notes(embedded: set[str], targets: Targets, without: Sequence[str], common: Sequence[str]) -> list[str]:
    """Who is left out, a line each."""
    counted = {
        "cases without a target": [*without, *(embedded - set(targets.table.index) - set(without))],
        "cases without an embedding in every table": [*((set(targets.table.index)) - set(common))],
    }
    return [f"{len(cases)} {what} are left out, such as {min(cases)}" for what, cases in counted.items() if cases]


def _provenance(paths: Sequence[Path]) -> list[str]:
    """What each table rests on, as far as the JSON beside it tells; not read where it is another program's."""
    lines = []
    for path in paths:
        record = path.with_suffix(".json")
        if not record.is_file():
            continue
        content = nnunet.read_json(record, "take it away, or embed again")
        encoder, cases = content.get("encoder", {}), content.get("cases", {})
        source = f"random weights of {content.get('plans')}" if encoder.get("untrained") else encoder.get("checkpoint")
        seen = sum(bool(case.get("seen_in_training")) for case in cases.values())
        lines.append(f"{path.stem}: {source}; its training has seen {seen} of {len(cases)} cases")
    return lines


def _text(request: ProbeRequest, targets: Targets, notes: Sequence[str], scores: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The tables as Markdown, with what they rest on."""
    counts = ", ".join(f"{(targets.table['target'] == n).sum()} {name}" for n, name in enumerate(targets.classes))
    patients = f"{len(targets.table)} cases of {targets.table['patient'].nunique()} patients"
    lines = [
        f"{targets.column}: {patients}{': ' + counts if counts else ''}",
        f"{request.num_folds} folds by patient, {request.num_repeats} times; 95 % intervals over patients",
        *notes,
    ]
    parts = ["\n".join(f"- {line}" for line in lines), _markdown(scores)]
    if not differences.empty:
        parts += [f"Differences to {differences['baseline'].iloc[0]}, on the same patients:", _markdown(differences)]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: pd.DataFrame) -> str:
    """A row an embedding, probe and group; a column a metric."""
    keys = ["embedding", "probe", "group", "num_cases"]
    texts = rows.assign(text=rows.apply(estimate_text, axis=1)).groupby([*keys, "metric"], sort=False)["text"].first()
    wide = texts.unstack("metric").fillna("-").rename(columns=TITLES).reset_index().rename(columns={"num_cases": "cases"})
    return str(wide.to_markdown(index=False, disable_numparse=True))


def _predictions(said: Mapping[tuple[str, str], Said], targets: Targets, folds: Sequence[Fold], num_folds: int) -> pd.DataFrame:
    """A row a prediction: embedding, probe, repeat, fold, case, patient, then class and probabilities, or value and predicted."""
    cases = np.concatenate([fold.test for fold in folds])
    number = np.concatenate([np.full(len(fold.test), number) for number, fold in enumerate(folds)])
    table = targets.table.iloc[cases]
    found = []
    for (name, probe), one in said.items():
        about = {"embedding": name, "probe": probe, "repeat": number // num_folds, "fold": number % num_folds}
        rows = pd.DataFrame({**about, "case": table.index, "patient": table["patient"].to_numpy()})
        if targets.classes:
            rows["class"] = [targets.classes[index] for index in table["target"]]
            rows[[PROBABILITY + of for of in targets.classes]] = one
        else:
            rows["value"], rows["predicted"] = table["target"].to_numpy(), one
        found.append(rows)
    return pd.concat(found, ignore_index=True)
