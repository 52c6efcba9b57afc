"""Which patients train, validate and test, and which of the training patients are labelled."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nnunet_csm.data.diagnoses import ClassTable, Sample
from nnunet_csm.data.splits import NUM_TENTHS, deal, repeated_splits, stratified_folds
from nnunet_csm.study.spec import Repeats, num_labelled

SEED = 12345


@dataclass(frozen=True)
class Division:
    """Cases by side. No patient is on two sides."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def everybody(table: ClassTable | None, cases: Collection[str], patients: Mapping[str, str]) -> ClassTable:
    """All cases: those that are not in the table are of a class of their own, beside its classes or parts of like numbers.

    Args:
        table: classes and patients, of some cases or none.
        cases: all.
        patients: of the other cases; one that is not in it is a patient of its own.
    """
    classes, samples = (table.classes, table.samples) if table is not None else ((), ())
    if table is not None and not classes:
        classes = tuple(f"{table.target}s, part {number} of {table.num_strata}" for number in range(1, table.num_strata + 1))
    others = sorted(set(cases) - {sample.case for sample in samples})
    if table is not None and not others:
        return table
    further = (Sample(case, len(classes), None, patients.get(case, case)) for case in others)
    return ClassTable((*classes, "without a class"), (*samples, *further))


def divide(table: ClassTable, repeats: Repeats) -> list[Division]:
    """One division per split or fold, by patient and stratified by class.

    Raises:
        UserError: too few patients.
    """
    if repeats.kind == "splits":
        found = repeated_splits(table, repeats.number, SEED)
        return [Division(tuple(one["train"]), tuple(one["val"]), tuple(one["test"])) for one in found]
    divisions = []
    for number, fold in enumerate(stratified_folds(table, repeats.number, SEED)):
        rest = table.only(fold["train"])
        num_parts = min(NUM_TENTHS, len({sample.patient for sample in rest.samples}))
        val, *others = deal(rest, num_parts, np.random.default_rng((SEED, number)))
        train = sorted(case for part in others for case in part)
        divisions.append(Division(tuple(train), tuple(sorted(val)), tuple(fold["val"])))
    return divisions


def labelled(table: ClassTable, division: Division, share: float, seed: int) -> tuple[str, ...]:
    """The labelled cases of a division's training side: a share of its patients, of all classes alike.

    The patients of a smaller share are among those of a larger one with the same seed.
    """
    by_class: dict[int, list[str]] = defaultdict(list)
    cases: dict[str, set[str]] = defaultdict(set)
    for sample in table.of(division.train):
        if sample.patient not in cases:
            by_class[sample.class_index].append(sample.patient)
        cases[sample.patient].add(sample.case)
    rng = np.random.default_rng((SEED, seed))
    ranked: list[tuple[Fraction, int, str]] = []
    for class_index, patients in sorted(by_class.items()):
        patients.sort()
        rng.shuffle(patients)
        # evenly spread over the order, whatever the size of the class
        ranked += [(Fraction(2 * i + 1, 2 * len(patients)), class_index, patient) for i, patient in enumerate(patients)]
    order = [patient for _, _, patient in sorted(ranked)]
    chosen = order[: num_labelled(share, len(order))]
    return tuple(sorted(case for patient in chosen for case in cases[patient]))


def sides(table: ClassTable, division: Division, share: float, seed: int) -> dict[str, list[str]]:
    """A division as a fold of a file of splits; where labels are few, the other training cases are `unlabelled`."""
    train = list(labelled(table, division, share, seed))
    found = {"train": train, "val": list(division.val), "test": list(division.test)}
    others = [case for case in division.train if case not in train]
    return found | ({"unlabelled": others} if others else {})


def taken_away(present: Sequence[str], share: float, numbers: Sequence[int], rng: np.random.Generator) -> tuple[str, ...]:
    """The series that an incomplete case loses, never all it has.

    Args:
        present: series it has.
        share: of the cases that lose any.
        numbers: of series to lose, each as likely.
        rng: of this case.
    """
    if rng.random() >= share or len(present) < 2:
        return ()
    number = min(int(rng.choice(numbers)), len(present) - 1)
    return tuple(sorted(rng.choice(sorted(present), number, replace=False).tolist()))
