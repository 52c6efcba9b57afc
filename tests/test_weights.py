"""Weights that load elsewhere: what is exported loads bit-equal, tells nothing of patients, and is whole or refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from factories import DATASET_JSON, PATCH_SIZE, SERIES, checkpoint_of, csm_plans, pretext_of
from nnunet_folders import NnunetFolders
from torch import Tensor

import nnunet_csm
from nnunet_csm import checkpoint, hub, weights_folder
from nnunet_csm.cli import main
from nnunet_csm.errors import UserError
from nnunet_csm.files import sha256_of_file
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.transfer import read_encoder, transfer
from nnunet_csm.plans import read_architecture, read_configuration
from nnunet_csm.schema import to_dict
from nnunet_csm.sharing.export import ExportRequest, export_weights
from nnunet_csm.weights_folder import CARD, CONFIG, WEIGHTS

NAME, PLANS = "Dataset001_Tiny", "nnUNetCSMPlans"
TRAINERS = {"encoder": "nnUNetTrainerCSMPretrain", "segmenter": "nnUNetTrainerCSM", "classifier": "nnUNetTrainerCSMClassifier"}
SECRET = "smith_john"


def secretive_plans() -> dict[str, Any]:
    """Plans that name a case and a path of this machine wherever they may."""
    plans = csm_plans()
    csm = plans["configurations"]["3d_fullres"]["csm"]
    csm["sources"][0]["absent_series"] = {SECRET: ["FLAIR"]}
    csm["preset"] = f"/home/{SECRET}/mine.json"
    csm["reasons"]["series"] = ["3", f"{SECRET} lacks one"]
    csm["finetuning"]["encoder"] = csm["classification"]["encoder"] = f"/home/{SECRET}/encoder.pth"
    return plans


def run_of(kind: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A network as drawn, and the checkpoint of its training."""
    plans = secretive_plans()
    settings = read_configuration(plans, "3d_fullres", "plans")
    torch.manual_seed(1)
    if kind == "encoder":
        network, others = pretext_of(settings), {"series": SERIES, "training_cases": [f"{NAME}/{SECRET}", f"{NAME}/b"]}
    elif kind == "segmenter":
        network = CSMSegmenter(len(SERIES), 3, **to_dict(settings.architecture))
        others = {"encoder_source": f"/home/{SECRET}/encoder.pth", "optimizer_state": {}}
    else:
        network = build_classifier(settings, len(SERIES), 2)
        others = {"classes": ["benign", "malignant"], "by_mask_label": False, "mask_labels": [], "series": SERIES}
        others |= {"encoder_source": "scratch", "training_cases": [f"{NAME}/{SECRET}"]}
    saved = checkpoint_of(plans, network.state_dict()) | {"trainer_name": TRAINERS[kind], "current_epoch": 7} | others
    saved["init_args"]["dataset_json"] = {**DATASET_JSON, "dataset": {SECRET: {"images": []}}, "description": "made-up"}
    return network.eval(), saved


@pytest.fixture
def save_run(nnunet_folders: NnunetFolders) -> Callable[..., Path]:
    """Puts the checkpoint of a training where it would be."""

    def save(kind: str, fold: str = "0", plans: str = PLANS) -> Path:
        (nnunet_folders.raw / NAME).mkdir(exist_ok=True)
        folder = nnunet_folders.results / NAME / f"{TRAINERS[kind]}__{plans}__3d_fullres" / f"fold_{fold}"
        folder.mkdir(parents=True)
        checkpoint.save(run_of(kind)[1], folder / "checkpoint_final.pth")
        return folder / "checkpoint_final.pth"

    return save


@pytest.fixture
def export(save_run: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Exports a network of a kind by the command; gives its checkpoint and the folder."""

    def run(kind: str, *flags: str) -> tuple[Path, Path]:
        path, folder = save_run(kind), tmp_path / f"weights of {kind}"
        assert main(["export_weights", "-d", "1", "-tr", TRAINERS[kind], "-o", str(folder), *flags]) == 0
        return path, folder

    return run


def images(names: tuple[str, ...] = SERIES) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {name: draws.normal(2.0, 3.0, (7, 13, 18)) for name in names}


def patches() -> Tensor:
    """The second one lacks a series."""
    drawn = torch.randn(2, len(SERIES), *PATCH_SIZE, generator=torch.Generator().manual_seed(0))
    drawn[1, 1] = 0
    return drawn


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_is_exported_loads_bit_equal(export: Callable[..., tuple[Path, Path]], kind: str) -> None:
    path, folder = export(kind)
    assert sorted(file.name for file in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
    before, after = checkpoint.load(path), checkpoint.load(folder)
    assert list(before["network_weights"]) != [] and before["network_weights"].keys() == after["network_weights"].keys()
    for name, tensor in before["network_weights"].items():
        assert tensor.dtype == after["network_weights"][name].dtype and torch.equal(tensor, after["network_weights"][name])
    old, new = (nnunet_csm.load_encoder(where) for where in (path, folder))
    assert old.series == new.series and old.spacing == new.spacing and old.token_size == new.token_size
    given = images(("T1w", "FLAIR"))
    assert torch.equal(old.features(given).tokens, new.features(given).tokens)
    described = weights_folder.describe(folder)
    assert described.kind == kind and described.images["series"] == list(SERIES)


@pytest.mark.parametrize("kind", ["segmenter", "classifier"])
def test_a_whole_network_loads_in_python(export: Callable[..., tuple[Path, Path]], kind: str) -> None:
    path, folder = export(kind)
    with torch.no_grad():
        expected = run_of(kind)[0](patches())
        for where in (path, folder):
            assert torch.equal(nnunet_csm.load_network(where)(patches()), expected)


def test_an_encoder_is_no_whole_network(export: Callable[..., tuple[Path, Path]]) -> None:
    with pytest.raises(UserError, match="load_encoder"):
        nnunet_csm.load_network(export("encoder")[1])


@pytest.mark.parametrize("kind", TRAINERS)
def test_nothing_of_patients_or_of_this_machine_is_told_unless_asked_for(
    export: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    _, folder = export(kind)
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.name != WEIGHTS}
    assert not any(SECRET in text or str(tmp_path) in text or "/home" in text for text in texts.values())
    assert "made-up" in texts[CARD] and "Not a medical" in texts[CARD] and "TO BE CHOSEN" in texts[CARD]
    if kind == "encoder":
        assert f"{NAME}: 2 training cases" in texts[CARD] and read_encoder(str(folder)).training_cases == ()
        main(["export_weights", "-d", "1", "-o", str(folder), "--case_names", "--overwrite"])
        assert read_encoder(str(folder)).training_cases == (f"{NAME}/{SECRET}", f"{NAME}/b")


def test_the_card_has_the_figures_that_stood_beside_the_checkpoint(
    save_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fold = save_run("segmenter").parent
    (fold / "validation").mkdir()
    mean = {"1": {"Dice": 0.25}, "2": {"Dice": 0.5}}
    (fold / "validation" / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": 0.375}, "mean": mean}))
    main(["export_weights", "-d", "1", "-tr", TRAINERS["segmenter"], "-o", str(tmp_path / "out")])
    text = (tmp_path / "out" / CARD).read_text()
    assert "| edema | 0.250 |" in text and "| tumor | 0.500 |" in text and "| mean | 0.375 |" in text
    fold = save_run("encoder").parent
    (fold / "probe.csv").write_text(
        "epoch,crops,hidden_part,hidden_part_linear,lesion_precision\n0,100,0.9,0.8,\n1,200,0.7,0.8,\n"
    )
    main(["export_weights", "-d", "1", "-o", str(tmp_path / "encoder")])
    text = (tmp_path / "encoder" / CARD).read_text()
    assert "200 crops" in text and "| 0.700 |" in text and "| 0.800 |" in text and "lesions" not in text
    fold = save_run("classifier").parent
    (fold / "validation").mkdir()
    metrics = {"auc": {"value": 0.7, "low": 0.5, "high": 0.9}, "balanced_accuracy": {"value": None, "low": None, "high": None}}
    (fold / "validation" / "summary.json").write_text(json.dumps({"num_patients": 9, "metrics": metrics}))
    main(["export_weights", "-d", "1", "-tr", TRAINERS["classifier"], "-o", str(tmp_path / "classes")])
    text = (tmp_path / "classes" / CARD).read_text()
    assert "9 patients" in text and "0.700 (0.500 to 0.900)" in text and "not defined" in text


def test_of_several_folds_one_is_named(save_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fold in ("0", "3"):
        save_run("encoder", fold)
    for flags, complaint in (((), "folds 0, 3 are trained"), (("-f", "1"), "no such checkpoint")):
        with pytest.raises(SystemExit) as stop:
            main(["export_weights", "-d", "1", "-o", str(tmp_path / "out"), *flags])
        assert stop.value.code == 2 and complaint in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["export_weights", "-d", "1", "-o", str(tmp_path / "out"), "-f", "3"]) == 0


def test_the_folder_is_whole_or_not_there(
    export: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = export("encoder")
    before = (folder / CONFIG).read_bytes()
    again = ["export_weights", "-d", "1", "-o", str(folder)]
    with pytest.raises(SystemExit):
        main(again)
    assert "--overwrite" in capsys.readouterr().err
    monkeypatch.setattr("nnunet_csm.sharing.export.card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    request = ExportRequest("1", TRAINERS["encoder"], PLANS, "3d_fullres", ("0",), path.name, "cpu", folder, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        export_weights(request)
    assert (folder / CONFIG).read_bytes() == before and os.listdir(folder.parent).count(folder.name) == 1
    assert not [name for name in os.listdir(folder.parent) if name.startswith(f".{folder.name}")]


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "no such file"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]), "SHA-256"),
        (lambda folder: (folder / CONFIG).unlink(), "no config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text('{"model_type": "vit"}'), "import_weights"),
        (lambda folder: edited(folder, lambda c: c.update(version=2)), "version"),
        (lambda folder: edited(folder, lambda c: c.update(code="x")), "unknown code"),
        (lambda folder: edited(folder, lambda c: c["images"].update(spacing=[2, 1, 1])), "images.spacing"),
        (lambda folder: edited(folder, lambda c: c["images"].update(more=1)), "images.more"),
        (lambda folder: edited(folder, lambda c: c["images"].pop("series")), "images.series"),
        (lambda folder: edited(folder, lambda c: c["checkpoint"]["init_args"].pop("plans")), "not whole"),
        (lambda folder: edited(folder, lambda c: c["checkpoint"].update(init_args=[])), "not whole"),
        (lambda folder: edited(folder, lambda c: c["checkpoint"].pop("trainer_name")), "not a training checkpoint"),
    ],
)
def test_a_folder_that_was_changed_is_refused(
    export: Callable[..., tuple[Path, Path]], damage: Callable[[Path], Any], complaint: str
) -> None:
    _, folder = export("encoder")
    damage(folder)
    with pytest.raises(UserError, match=complaint):
        checkpoint.load(folder)


def test_bytes_that_are_no_tensors_are_refused_also_with_their_hash(export: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = export("encoder")
    for content in (b"", b"\xff" * 64, b"\x80\x02}q\x00."):
        (folder / WEIGHTS).write_bytes(content)
        edited(folder, lambda c: c["sha256"].update({WEIGHTS: sha256_of_file(folder / WEIGHTS)}))
        with pytest.raises(UserError, match="not readable as safetensors"):
            checkpoint.load(folder)


def test_series_and_sizes_that_do_not_fit_are_answered_as_for_checkpoints(export: Callable[..., tuple[Path, Path]]) -> None:
    path, folder = export("encoder")
    for change in ({"token_size": (4, 4, 2), "patch_size": (4, 12, 10)}, {"architecture": {"depth": 4}}):
        architecture = read_architecture(csm_plans(**change), "3d_fullres", "plans")
        said = []
        for where in (path, folder):
            with pytest.raises(UserError) as error:
                transfer(read_encoder(str(where)), build_encoder(architecture), architecture)
            said.append(str(error.value).replace(str(where), "HERE"))
        assert said[0] == said[1]
    # other series: by name, a new one from the mean, the same from both
    architecture = read_architecture(csm_plans(series=("T2w", "FLAIR", "DWI")), "3d_fullres", "plans")
    encoders = [build_encoder(architecture) for _ in range(2)]
    for where, encoder in zip((path, folder), encoders, strict=True):
        transfer(read_encoder(str(where)), encoder, architecture)
    assert all(torch.equal(a, b) for a, b in zip(*(one.state_dict().values() for one in encoders), strict=True))


# --- names -------------------------------------------------------------------------------------------------------------------


def put_in_cache(folder: Path, cache: Path, revisions: tuple[str, ...]) -> Path:
    """The layout of Hugging Face's cache: links to blobs in a folder for each revision, and which of them is main."""
    repository = cache / "models--some-org--glioma.csm"
    (repository / "blobs").mkdir(parents=True)
    for file in folder.iterdir():
        (repository / "blobs" / sha256_of_file(file)).write_bytes(file.read_bytes())
    for revision in revisions:
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            (snapshot / file.name).symlink_to(f"../../blobs/{sha256_of_file(file)}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revisions[0])
    return repository


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's hub; nothing is fetched."""
    constants = pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv(hub.DOWNLOAD_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_name_is_found_in_the_local_cache_and_a_folder_of_the_cache_by_its_path(
    export: Callable[..., tuple[Path, Path]], cache: Path
) -> None:
    path, folder = export("encoder")
    newest, older = "0123abcd" * 5, "feed" * 10
    repository = put_in_cache(folder, cache, (newest, older))
    assert hub.find_weights("some-org/glioma.csm") == hub.find_weights(str(repository)) == repository / "snapshots" / newest
    assert hub.find_weights(f"some-org/glioma.csm@{older}") == repository / "snapshots" / older
    assert hub.find_weights(str(path)) == path and hub.find_weights(str(folder)) == folder
    given = images()
    expected = nnunet_csm.load_encoder(path).features(given).tokens
    assert torch.equal(nnunet_csm.load_encoder("some-org/glioma.csm").features(given).tokens, expected)
    # a path that is there comes first
    there = Path("some-org/glioma.csm")
    there.parent.mkdir()
    there.symlink_to(folder)
    assert hub.find_weights("some-org/glioma.csm") == there


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ("some-org/nowhere", "the hub is not asked unless --download or nnUNet_csm_download=1"),
        ("some-org/glioma.csm@newer", "the hub is not asked"),
        ("nowhere", "no such checkpoint"),
        ("../up/and/away.pth", "no such checkpoint"),
        (".", "no config.json in it"),
        ("hub/models--some-org--glioma.csm", "2 revisions"),
    ],
)
def test_what_is_not_there_is_not_fetched(
    export: Callable[..., tuple[Path, Path]], cache: Path, wanted: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = put_in_cache(export("encoder")[1], cache, ("a", "b"))
    (repository / "refs" / "main").unlink()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was to be fetched"))
    with pytest.raises(UserError, match=complaint):
        hub.find_weights(wanted)


def test_something_is_fetched_where_that_was_asked_for_and_only_what_executes_nothing(
    export: Callable[..., tuple[Path, Path]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    folder = export("encoder")[1]

    def fetch(name: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("nnunet_csm.planning.preprocessing.check_plans", lambda *_, **__: "Dataset001_Tiny")
    monkeypatch.setattr("nnunet_csm.cli.training._run_ranks", lambda *_: None)
    monkeypatch.setenv("nnUNet_csm_encoder", "")
    for flags, fetched in (((), False), (("--download",), True)):
        monkeypatch.setenv(hub.DOWNLOAD_VARIABLE, "")
        assert main(["finetune", "-d", "1", "-encoder", "some-org/glioma", "-device", "cpu", *flags]) == 0
        assert hub.find_weights(os.environ["nnUNet_csm_encoder"]) == folder
        assert asked[-1]["local_files_only"] != fetched and asked[-1]["allow_patterns"] == [CONFIG, WEIGHTS, CARD]


def test_a_name_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"nnunet_csm\[hub\]"):
        hub.find_weights("some-org/glioma")


# --- fine-tuning -------------------------------------------------------------------------------------------------------------


def test_finetuning_from_the_folder_begins_as_from_the_checkpoint(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrainer = make_trainer(True)
    pretrainer.initialize()
    pretrainer.open_banks()
    path = Path(pretrainer.output_folder) / "checkpoint_final.pth"
    pretrainer.save_checkpoint(str(path))
    command = ["export_weights", "-d", "900", "-o", str(tmp_path / "weights")]
    assert main(command) == 0
    begun = {}
    for name, wanted in (("auto", "auto"), ("file", str(path)), ("folder", str(tmp_path / "weights"))):
        monkeypatch.setenv("nnUNet_csm_encoder", wanted)
        finetuner = make_trainer(
            False, change=lambda entry: entry["csm"]["finetuning"].update(encoder="auto", masked_loss_weight=0.5)
        )
        finetuner.initialize()
        capsys.readouterr()
        finetuner.on_fresh_start()
        said = capsys.readouterr().out
        assert ("does not name the cases" in said) == (name == "folder") and "its decoder goes on from" in said
        network = {k: v.clone() for k, v in finetuner.bare_network.state_dict().items()}
        begun[name] = network | {f"masked.{k}": v.clone() for k, v in finetuner.masked.own_weights().items()}
    assert any(key.startswith("masked.") for key in begun["auto"])
    for name in ("file", "folder"):
        assert begun["auto"].keys() == begun[name].keys()
        assert all(torch.equal(tensor, begun[name][key]) for key, tensor in begun["auto"].items())


def test_trainers_that_are_not_ours_and_networks_without_our_encoder_are_refused(
    save_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_run("segmenter")
    saved = checkpoint.load(path)
    saved["network_weights"] = {name: t for name, t in saved["network_weights"].items() if not name.startswith("encoder.")}
    checkpoint.save(saved, path)
    with pytest.raises(SystemExit):
        main(["export_weights", "-d", "1", "-tr", TRAINERS["segmenter"], "-o", str(tmp_path / "out")])
    assert "without an encoder of ours" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_encoder_alone_is_no_onnx_model(
    save_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run("encoder")
    with pytest.raises(SystemExit):
        main(["export_weights", "-d", "1", "-o", str(tmp_path / "out"), "--onnx"])
    assert "--onnx: an encoder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_onnx_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nnunet_csm.sharing import onnx_model

    monkeypatch.setattr(onnx_model, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None)))
    with pytest.raises(UserError, match=r"nnunet_csm\[onnx\]"):
        onnx_model.write_onnx("segmenter", {}, {}, tmp_path / "model.onnx")
