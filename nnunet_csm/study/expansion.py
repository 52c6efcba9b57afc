"""Which runs a study has: what is to be trained, with which plans and patients, and which rows of the table it serves."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_csm import weights_folder
from nnunet_csm.data.sources import run_name
from nnunet_csm.data.splits import split_problems
from nnunet_csm.errors import UserError
from nnunet_csm.files import sha256_of_file
from nnunet_csm.hub import find_weights
from nnunet_csm.model.encoder import encoder_class
from nnunet_csm.model.transfer import read_encoder
from nnunet_csm.planning.presets import merged, method_of
from nnunet_csm.plans import PLANS_NAME
from nnunet_csm.pretext.base import Pretext, setup_of
from nnunet_csm.pretext.cost import mean_seen_tokens
from nnunet_csm.schema import Size
from nnunet_csm.study.dataset import Dataset, common_patch, hashed
from nnunet_csm.study.divisions import SEED, divide, labelled, sides, taken_away
from nnunet_csm.study.runs import ALL, CLASSIFIER, PRETRAINER, SEGMENTER, YARDSTICK, Evaluation, Row, Run, Runs
from nnunet_csm.study.spec import Arm, Study, pretraining_changes


def arm_changes(study: Study, arm: Arm) -> dict[str, Any]:
    """What an arm changes about the preset: what the study changes, then its method, then itself."""
    return merged(merged(study.changes, method_of(arm.method) if arm.method else {}), arm.changes)


class Expansion:
    """Makes the runs of a study, as far as what is done tells which they are."""

    def __init__(self, study: Study, name: str, dataset: Dataset, records: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            study: what to do.
            name: of the study, part of the names of plans and splits.
            dataset: to do it on.
            records: of the runs that are done, by id.
        """
        self.study, self.name, self.dataset, self.records = study, name, dataset, records
        self.table = dataset.classes if study.task == "classification" else dataset.table
        self.divisions = divide(self.table, study.repeats)
        self.result = Runs()
        self.named_splits: dict[tuple[float, int], str] = {}
        self.own = [arm for arm in study.arms if arm.is_trained]
        self.check()

    def check(self) -> None:
        """What would stop runs hours later.

        Raises:
            UserError: nnU-Net's plans that a yardstick needs are not there, or a side of a division lacks classes.
        """
        for arm in self.study.arms:
            if arm.nnunet is not None:
                self.dataset.stock_plans(arm.nnunet.plans)
        if self.study.task == "classification":
            for share, seed in itertools.product(self.study.labels, range(self.study.repeats.seeds)):
                for number, split in enumerate(self.result.splits[self.splits(share, seed)]):
                    if problems := split_problems(self.table, split):
                        raise UserError(
                            f"study {self.name}: with {share:.0%} of the labels, division {number} of {self.dataset.name}: "
                            f"{problems[0]}; take larger shares, or other repeats"
                        )

    def expand(self) -> Runs:
        if self.study.task == "reconstruction":
            self.add_reconstructions()
            return self.result
        for arm, share in itertools.product(self.own, self.study.labels):
            for fold in range(len(self.divisions)):
                changes = self.searched(arm, share, fold)
                if changes is not None:
                    for seed, series in itertools.product(range(self.study.repeats.seeds), self.finetuned):
                        run = self.add_finetuning(arm, share, fold, seed, series, changes)
                        self.result.rows.append(self.row(run, arm, share, fold, seed, series))
        for arm in self.study.arms:
            if arm.nnunet is not None:
                for share in self.study.labels:
                    self.add_yardstick(arm, share)
        return self.result

    @property
    def finetuned(self) -> tuple[str, ...]:
        """Series that a network is fine-tuned on: all, or one of them."""
        alone = () if self.study.finetuned == "all" else self.dataset.series
        together = () if self.study.finetuned == "each" else (ALL,)
        return (*together, *alone)

    def searched(self, arm: Arm, share: float, fold: int) -> dict[str, Any] | None:
        """The arm's changes with the values that are best on the validation patients of this division, with its first seed.

        Division by division, since the validation patients of one are tested in another.

        Returns:
            None as long as not all of them were tried; then runs that try them have been added.
        """
        changes = arm_changes(self.study, arm)
        if not self.study.search:
            return changes
        tried = []
        for values in itertools.product(*self.study.search.values()):
            candidate = merged(changes, nested(dict(zip(self.study.search, values, strict=True))))
            run = self.add_finetuning(arm, share, fold, 0, self.finetuned[0], candidate)
            tried.append((self.records.get(run.id), candidate, values))
        if any(record is None for record, _, _ in tried):
            what = f"{arm.name} with {share:.0%} of the labels, division {fold}"
            self.result.waiting.append(f"{what}: best of {len(tried)} settings")
            return None
        # the first of equals
        best = max(range(len(tried)), key=lambda i: (tried[i][0] or {})["validation"])
        self.result.chosen[arm.name, share, fold] = dict(zip(self.study.search, tried[best][2], strict=True))
        return tried[best][1]

    def row(self, run: Run, arm: Arm, share: float, fold: int, seed: int, series: str) -> Row:
        num = len(labelled(self.table, self.divisions[fold], share, seed))
        return Row(run.id, arm.name, share, num, fold, fold * self.study.repeats.seeds + seed, series)

    def add_finetuning(self, arm: Arm, share: float, fold: int, seed: int, series: str, changes: Mapping[str, Any]) -> Run:
        given = self.encoder(arm, fold) if arm.encoder else None
        needs = self.add_pretraining(arm, fold, changes).id if arm.pretrained and given is None else None
        plans = self.dataset.plans(self.study.preset, changes)
        entry = plans["configurations"][self.dataset.configuration]
        csm = entry["csm"]
        csm |= {"seed": SEED + seed, "splits": self.splits(share, seed)}
        if series != ALL:
            entry["architecture"]["arch_kwargs"] |= {"series": [series], "channels": [self.dataset.found.channels[series]]}
        removed = self.removed(arm)
        absent = csm["sources"][0]["absent_series"]
        csm["sources"][0]["absent_series"] = {
            case: sorted({*absent.get(case, ()), *removed.get(case, ())}) for case in sorted({*absent, *removed})
        }
        classifies = self.study.task == "classification"
        # which one it is, each run is told
        csm["classification" if classifies else "finetuning"]["encoder"] = "auto" if needs or given else "scratch"
        settings = self.dataset.settings({**plans, "plans_name": self.name})
        schedule = settings.csm.classification.schedule if classifies else settings.csm.finetuning_schedule
        patch = settings.csm.classification.patch_size if classifies else settings.patch_size
        network = settings.architecture
        kept_apart = len(network.series) if encoder_class(network).keeps_series_apart else 1
        num_tokens = np.prod(patch) // np.prod(network.token_size) * kept_apart
        return self.add(
            "fine-tuning",
            plans,
            CLASSIFIER if classifies else SEGMENTER,
            fold,
            needs=needs,
            given=given,
            tests=self.tests(fold, network.series, removed),
            num_crops=schedule.num_iterations * schedule.batch_size,
            visible_tokens=float(num_tokens),
        )

    def encoder(self, arm: Arm, fold: int) -> Path:
        """The weights that an arm names for a division.

        Raises:
            UserError: there are none, or they learned from images of patients that are tested.
        """
        where = f"study {self.name}: arm {arm.name!r}"
        try:
            path = find_weights(os.path.expandvars(arm.encoder).replace("{division}", str(fold))).resolve()
            seen = learned(path).cases & {run_name(self.dataset.name, case) for case in self.divisions[fold].test}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if seen:
            raise UserError(
                f"{where}: {path} learned from images of {len(seen)} test cases of division {fold}, {min(seen)} first, and would "
                f"score too well; leave encoder out, and the study pretrains without them"
            )
        return path

    def add_reconstructions(self) -> None:
        """Pretrainings whose networks rebuild patches of test cases, the same for all arms.

        Raises:
            UserError: an arm that rebuilds nothing, or arms of different series.
        """
        changes = {arm.name: arm_changes(self.study, arm) for arm in self.own}
        settings = {name: self.dataset.settings(self.dataset.plans(self.study.preset, of)) for name, of in changes.items()}
        for name, one in settings.items():
            if setup_of(one)[0].rebuilt is Pretext.rebuilt:
                raise UserError(f"study {self.name}: arm {name!r}: {one.csm.pretext['name']} rebuilds nothing; leave the arm out")
        if len({self.pretraining_series(arm) for arm in self.own}) > 1:
            raise UserError(f"study {self.name}: arms are pretrained on different series, and share no patches to be scored on")
        patch = common_patch([*settings.values()])
        for arm, fold in itertools.product(self.own, range(len(self.divisions))):
            run = self.add_pretraining(arm, fold, changes[arm.name], patch)
            self.result.rows.append(self.row(run, arm, 1.0, fold, 0, ALL))

    def add_pretraining(self, arm: Arm, fold: int, changes: Mapping[str, Any], scored: Size | None = None) -> Run:
        """Add the pretraining of an arm in a division; `scored` is the size of the patches that it learns and is scored on."""
        plans = self.dataset.plans(self.study.preset, pretraining_changes(changes))
        csm = plans["configurations"][self.dataset.configuration]["csm"]
        csm |= {"seed": SEED, "splits": self.splits(1.0, 0)} | ({"pretraining_patch_size": [*scored]} if scored else {})
        wanted = self.pretraining_series(arm)
        for source in csm["sources"]:
            source["channels"] = {name: channel for name, channel in source["channels"].items() if name in wanted}
        settings = self.dataset.settings({**plans, "plans_name": self.name})
        schedule = settings.csm.pretraining
        return self.add(
            "pretraining",
            plans,
            PRETRAINER,
            fold,
            tests=self.tests(fold, wanted, {}) if scored else (),
            num_crops=schedule.num_iterations * schedule.batch_size,
            visible_tokens=mean_seen_tokens(settings, self.dataset.presence(wanted)),
        )

    def pretraining_series(self, arm: Arm) -> tuple[str, ...]:
        wanted = arm.pretraining_series
        if isinstance(wanted, int):
            if wanted > len(self.dataset.series):
                raise UserError(
                    f"study {self.name}: arm {arm.name!r}: {self.dataset.name} has {len(self.dataset.series)} series; leave the "
                    f"arm out in a file of your own that inherits from this one"
                )
            wanted = self.dataset.series[:wanted]
        if wanted is not None and (unknown := sorted(set(wanted) - set(self.dataset.series))):
            raise UserError(
                f"study {self.name}: arm {arm.name!r}: pretraining_series {', '.join(unknown)}: {self.dataset.name} has "
                f"{', '.join(self.dataset.series)}"
            )
        return self.dataset.series if wanted is None else tuple(wanted)

    def add_yardstick(self, arm: Arm, share: float) -> None:
        """Stock nnU-Net, once the times of the arm it is beside are known."""
        assert arm.nnunet is not None
        like = [self.result.runs[r.run] for r in self.result.rows if (r.arm, r.labels) == (arm.nnunet.minutes_of, share)]
        stages = [[run.id, *([run.needs] if arm.nnunet.with_pretraining and run.needs else [])] for run in like]
        # all of them: with other minutes it would be another run
        if len(like) < len(self.divisions) * self.study.repeats.seeds or not all(
            one in self.records for of_run in stages for one in of_run
        ):
            self.result.waiting.append(f"{arm.name} with {share:.0%} of the labels: the time of {arm.nnunet.minutes_of}")
            return
        minutes = round(float(np.mean([sum(self.records[one]["seconds"] for one in of_run) for of_run in stages])) / 60, 1)
        for fold, seed in itertools.product(range(len(self.divisions)), range(self.study.repeats.seeds)):
            plans = self.dataset.stock_plans(arm.nnunet.plans)
            plans["csm_yardstick"] = {"minutes": max(0.1, minutes), "splits": self.splits(share, seed), "seed": SEED + seed}
            # it knows nothing of missing series and copies, neither in training nor here
            everything = tuple(self.dataset.found.channels.values())
            test = Evaluation(ALL, {case: everything for case in self.divisions[fold].test if self.dataset.present[case]})
            run = self.add("fine-tuning", plans, YARDSTICK, fold, tests=(test,))
            self.result.rows.append(self.row(run, arm, share, fold, seed, ALL))

    def add(
        self,
        kind: Literal["pretraining", "fine-tuning"],
        plans: dict[str, Any],
        trainer: str,
        fold: int,
        needs: str | None = None,
        given: Path | None = None,
        tests: tuple[Evaluation, ...] = (),
        num_crops: int = 0,
        visible_tokens: float = 0.0,
    ) -> Run:
        del plans["plans_name"]
        start = self.result.runs[needs].plans_name if needs else learned(given).digest if given else None
        digest = hashed([trainer, start, essence(plans, trainer)])
        plans_name = f"{PLANS_NAME}_{self.name}_{digest}"
        run = Run(
            id=f"{digest}_{fold}",
            kind=kind,
            dataset=self.dataset.name,
            configuration=self.dataset.configuration,
            plans_name=plans_name,
            trainer=trainer,
            fold=fold,
            needs=needs,
            encoder=self.result.runs[needs].folder / "checkpoint_final.pth" if needs else given,
            tests=tests,
            num_crops=num_crops,
            visible_tokens=visible_tokens,
        )
        self.result.plans[plans_name] = {**plans, "plans_name": plans_name}
        return self.result.runs.setdefault(run.id, run)

    def splits(self, share: float, seed: int) -> str:
        """The name of the file with the labelled cases of every division."""
        # all are all, whatever the seed
        seed = 0 if share == 1.0 else seed
        if (share, seed) in self.named_splits:
            return self.named_splits[share, seed]
        content = [sides(self.table, division, share, seed) for division in self.divisions]
        name = f"splits_{self.name}_{hashed(content)}.json"
        self.result.splits[name] = content
        self.named_splits[share, seed] = name
        return name

    def removed(self, arm: Arm) -> dict[str, tuple[str, ...]]:
        """Case to the series that an arm with incomplete series does without, the same for all of its runs."""
        if arm.incomplete is None:
            return {}
        found = {}
        for number, (case, present) in enumerate(sorted(self.dataset.present.items())):
            rng = np.random.default_rng((SEED, number))
            if lost := taken_away(present, arm.incomplete.share, arm.incomplete.remove, rng):
                found[case] = lost
        return found

    def tests(self, fold: int, series: Sequence[str], removed: Mapping[str, tuple[str, ...]]) -> tuple[Evaluation, ...]:
        """Test cases of a division with the subsets of series that are asked for; cases that have none of them are left out."""
        channels, present = self.dataset.found.channels, self.dataset.present
        fewest = {"all": len(series), "one_missing": max(1, len(series) - 1), "subsets": 1}[self.study.tested]
        tests = []
        for subset in (s for n in range(fewest, len(series) + 1) for s in itertools.combinations(series, n)):
            given = {
                case: tuple(channels[name] for name in subset if name in present[case] and name not in removed.get(case, ()))
                for case in self.divisions[fold].test
            }
            name = ALL if len(subset) == len(series) else "+".join(subset)
            if any(given.values()) and not (name == ALL and self.study.task == "classification"):
                tests.append(Evaluation(name, {case: numbers for case, numbers in given.items() if numbers}))
        return tuple(tests)


@dataclass(frozen=True)
class Learned:
    """Weights from elsewhere: a hash of them, and the cases that they say they were learned from."""

    digest: str
    cases: frozenset[str]


@cache
def learned(path: Path) -> Learned:
    """Read the weights of an encoder, once."""
    digest = sha256_of_file(path / weights_folder.WEIGHTS if path.is_dir() else path)
    return Learned(digest, frozenset(read_encoder(str(path)).training_cases))


# blocks of the recipe that one trainer reads
READ_BY = {"classification": CLASSIFIER, "finetuning_schedule": SEGMENTER}


def essence(plans: Mapping[str, Any], trainer: str) -> dict[str, Any]:
    """Plans without what only people read, or other trainers: a reason in other words makes no other run."""
    told = ("preset", "reasons", *(key for key, reader in READ_BY.items() if reader != trainer))
    configurations = {
        name: {**entry, "csm": {key: value for key, value in entry["csm"].items() if key not in told}}
        if "csm" in entry
        else entry
        for name, entry in plans["configurations"].items()
    }
    return {**plans, "configurations": configurations}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        here = result
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return result
