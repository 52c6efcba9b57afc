"""Splits by patient, stratified by class, or by the size of a number."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nnunet_csm.data.diagnoses import ClassTable, Sample
from nnunet_csm.errors import UserError

# repeats are cut from tenths: eight to train on, one to validate, one to test
NUM_TENTHS = 10


def stratified_folds(table: ClassTable, num_folds: int = 5, seed: int = 12345) -> list[dict[str, list[str]]]:
    """nnU-Net's `splits_final`: every case is validated once; patients stay whole; strata as evenly as that allows.

    Raises:
        UserError: fewer patients than folds.
    """
    parts = deal(table, num_folds, np.random.default_rng(seed))
    return [{"train": _all_but(parts, fold), "val": sorted(part)} for fold, part in enumerate(parts)]


def repeated_splits(table: ClassTable, num_repeats: int = 10, seed: int = 12345) -> list[dict[str, list[str]]]:
    """Random divisions into training, validation and test as 8:1:1 by patient, stratified.

    Every ten repeats rest on one division into tenths, and each tenth is the test side of one of them: ten repeats test
    every patient exactly once.

    Raises:
        UserError: fewer than ten patients.
    """
    splits = []
    for repeat in range(num_repeats):
        shuffle, test = divmod(repeat, NUM_TENTHS)
        parts = deal(table, NUM_TENTHS, np.random.default_rng((seed, shuffle)))
        val = (test + 1) % NUM_TENTHS
        splits.append({"train": _all_but(parts, test, val), "val": sorted(parts[val]), "test": sorted(parts[test])})
    return splits


def split_problems(table: ClassTable, split: Mapping[str, Collection[str]]) -> list[str]:
    """Why a split cannot serve a classifier, a line each; empty when it can.

    A side has samples of at least two classes, the training side of all of them, or of two different numbers; no patient is on
    two sides. Cases that are not in the table do not count.
    """
    problems = []
    sides: dict[str, set[str]] = defaultdict(set)
    for side, cases in split.items():
        samples = table.of(cases)
        for sample in samples:
            sides[sample.patient].add(side)
        if side == "unlabelled":
            # whatever they are, nothing is made of it
            continue
        found, absent = {sample.class_index for sample in samples}, table.lacking(samples)
        if not found:
            problems.append(f"{side} has no case with a {table.target}")
        elif table.classes and len(found) == 1:
            problems.append(f"{side} has one class only, {table.classes[found.pop()]}")
        elif side == "train" and absent:
            problems.append(f"train has no sample of {', '.join(absent)}")
    problems += [f"patient {patient} is in {' and '.join(sorted(on))}" for patient, on in sorted(sides.items()) if len(on) > 1]
    return problems


def deal(table: ClassTable, num_parts: int, rng: np.random.Generator) -> list[list[str]]:
    """Cases in parts of equal size and equal shares of the strata, as far as patients, who stay whole, allow.

    Patients come in random order, those with most samples first. Each goes to the part that has least of the strata it
    brings, and of such parts to the smallest; so none stays empty, as a part without a case has least of everything.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    for sample in table.samples:
        samples[sample.patient].append(sample)
    if len(samples) < num_parts:
        raise UserError(
            f"{len(samples)} patients cannot be dealt into {num_parts} parts; take fewer folds, of which repeats of 8:1:1 need "
            f"{NUM_TENTHS}"
        )
    patients = sorted(samples)
    rng.shuffle(patients)
    patients.sort(key=lambda patient: -len(samples[patient]))
    totals = np.maximum(1, _counts(table.samples, table.num_strata))
    counts = np.zeros((num_parts, table.num_strata))
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    for patient in patients:
        brought = _counts(samples[patient], table.num_strata)
        has_of_it = counts @ (brought / totals**2)
        chosen = int(np.lexsort((counts.sum(1), has_of_it))[0])
        counts[chosen] += brought
        parts[chosen] += sorted({sample.case for sample in samples[patient]})
    return parts


def _counts(samples: Iterable[Sample], num_strata: int) -> Int[np.ndarray, " c"]:
    return np.bincount([sample.class_index for sample in samples], minlength=num_strata)


def _all_but(parts: Sequence[Sequence[str]], *held_out: int) -> list[str]:
    return sorted(case for number, part in enumerate(parts) for case in part if number not in held_out)
