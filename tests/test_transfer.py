"""A pretrained encoder enters a segmenter whole and by series name, or not at all."""

import pytest
import torch
from factories import (
    GRID_SIZE,
    JOINT,
    PATCH_SIZE,
    SERIES,
    TOKEN_SIZE,
    as_version_2,
    base_plans,
    checkpoint_of,
    csm_plans,
    pretext_of,
)
from torch import nn

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.model.planned import series_present
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import all_tokens, coordinates, select, to_map, to_tokens
from nnunet_csm.model.transfer import as_table, read_encoder, transfer
from nnunet_csm.plans import read_configuration
from nnunet_csm.schema import to_dict


def pretrained(folder, plans=None):
    """A model as if pretrained, and its checkpoint."""
    plans = csm_plans() if plans is None else plans
    settings = read_configuration(plans, "3d_fullres", "plans")
    torch.manual_seed(1)
    model = pretext_of(settings).eval()
    path = folder / "checkpoint_final.pth"
    checkpoint.save(checkpoint_of(plans, model.state_dict()), path)
    return model, path


def downstream(**changes):
    """A fresh segmenter of plans with the given changes, and its architecture."""
    architecture = read_configuration(csm_plans(**changes), "3d_fullres", "plans").architecture
    torch.manual_seed(2)
    return CSMSegmenter(len(architecture.series), 3, **to_dict(architecture)).eval(), architecture


def features(encoder, volume):
    """The encoder's features of all tokens, (b, s, l, e)."""
    index = all_tokens(volume.shape[1], GRID_SIZE, len(volume), volume.device)
    with torch.no_grad():
        encoded = encoder(select(to_tokens(volume, TOKEN_SIZE), index), coordinates(index, GRID_SIZE))[-1]
    return encoded.unflatten(1, (volume.shape[1], -1))


def random_volume():
    return torch.randn(2, len(SERIES), *PATCH_SIZE, generator=torch.Generator().manual_seed(3))


def refused(path, match, **changes):
    """Transferring raises a `UserError` that names the file and leaves the target as it was."""
    network, architecture = downstream(**changes)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=match) as caught:
        transfer(read_encoder(str(path)), network.encoder, architecture)
    assert str(path) in str(caught.value)
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


# --- what fits ---------------------------------------------------------------------------------------------------------------


def test_features_are_equal_before_and_after(tmp_path):
    model, path = pretrained(tmp_path)
    network, architecture = downstream()
    volume = random_volume()
    expected = features(model.encoder, volume)
    assert not features(network.encoder, volume).equal(expected)
    transfer(read_encoder(str(path)), network.encoder, architecture)
    assert features(network.encoder, volume).equal(expected)
    with torch.no_grad():
        last = network.encode(volume, series_present(volume))[-1].main
    torch.testing.assert_close(last, to_map(expected.mean(1), GRID_SIZE))


def test_series_in_another_order_are_matched_by_name(tmp_path):
    model, path = pretrained(tmp_path)
    order = [1, 2, 0]
    network, architecture = downstream(series=[SERIES[n] for n in order])
    transfer(read_encoder(str(path)), network.encoder, architecture)
    volume = random_volume()
    expected = features(model.encoder, volume)[:, order]
    torch.testing.assert_close(features(network.encoder, volume[:, order]), expected, rtol=1e-4, atol=1e-5)


def test_fewer_series_take_theirs_and_a_new_one_starts_from_the_mean(tmp_path):
    model, path = pretrained(tmp_path)
    network, architecture = downstream(series=["T2w", "DWI"])
    rows = transfer(read_encoder(str(path)), network.encoder, architecture)
    known, new = network.encoder.series_embedding
    assert known.equal(model.encoder.series_embedding[SERIES.index("T2w")])
    torch.testing.assert_close(new, model.encoder.series_embedding.mean(0))
    how = {row.name: row.how for row in rows}
    assert "from T2w" in how["series_embedding[T2w]"]
    assert "mean of FLAIR, T1w, T2w" in how["series_embedding[DWI]"]
    assert network.encoder.series_embedding.requires_grad


def test_every_tensor_of_the_encoder_is_accounted_for(tmp_path):
    _, path = pretrained(tmp_path)
    network, architecture = downstream()
    rows = transfer(read_encoder(str(path)), network.encoder, architecture)
    named = {row.name: row.shape for row in rows}
    expected = {name: tuple(t.shape) for name, t in network.encoder.state_dict().items() if name != "series_embedding"}
    expected |= {f"series_embedding[{name}]": (network.encoder.width,) for name in SERIES}
    assert named == expected
    table = as_table(rows)
    assert all(word in table for word in ("embedding.weight", "blocks.0", "blocks.2", "norm.bias", "series_embedding[T1w]"))


def test_another_patch_decoder_and_number_of_features_do_not_matter(tmp_path):
    model, path = pretrained(tmp_path, csm_plans(reconstruction={"width": 18}))
    network, architecture = downstream(patch_size=(8, 8, 8), architecture={"features": 2, "drop_path": 0.2})
    transfer(read_encoder(str(path)), network.encoder, architecture)
    assert features(network.encoder, random_volume()).equal(features(model.encoder, random_volume()))


def test_the_encoder_of_a_segmenter_can_be_transferred_too(tmp_path):
    network, architecture = downstream()
    path = tmp_path / "checkpoint_best.pth"
    checkpoint.save(checkpoint_of(csm_plans(), network.state_dict()), path)
    other = CSMSegmenter(len(SERIES), 7, **to_dict(architecture)).eval()
    transfer(read_encoder(str(path)), other.encoder, architecture)
    assert features(other.encoder, random_volume()).equal(features(network.encoder, random_volume()))


def test_an_encoder_enters_whatever_else_its_plans_said(tmp_path):
    plans = csm_plans()
    plans["configurations"]["3d_fullres"]["csm"] = {"version": 0}
    model, path = pretrained(tmp_path)
    checkpoint.save(checkpoint_of(plans, model.state_dict()), path)
    network, architecture = downstream()
    transfer(read_encoder(str(path)), network.encoder, architecture)
    assert features(network.encoder, random_volume()).equal(features(model.encoder, random_volume()))


def test_how_weights_began_does_not_matter(tmp_path):
    model, path = pretrained(tmp_path)
    network, architecture = downstream(architecture={"encoder": {"series_embedding_std": 0.02, "query_key_gain": 0.0}})
    transfer(read_encoder(str(path)), network.encoder, architecture)
    assert features(network.encoder, random_volume()).equal(features(model.encoder, random_volume()))


@pytest.mark.parametrize("changes", [{}, JOINT], ids=["csm", "joint"])
def test_an_encoder_pretrained_by_plans_of_version_2_enters(tmp_path, changes):
    model, path = pretrained(tmp_path, as_version_2(csm_plans(**changes)))
    network, architecture = downstream(**changes)
    transfer(read_encoder(str(path)), network.encoder, architecture)
    assert all(network.encoder.state_dict()[name].equal(tensor) for name, tensor in model.encoder.state_dict().items())


BY_SERIES = {"encoder": {"embedding": "by_series"}}


def test_layers_of_series_are_carried_by_name_and_a_new_series_starts_from_their_mean(tmp_path):
    model, path = pretrained(tmp_path, csm_plans(architecture=BY_SERIES))
    network, architecture = downstream(series=["T2w", "DWI", "FLAIR"], architecture=BY_SERIES)
    rows = transfer(read_encoder(str(path)), network.encoder, architecture)
    found, source = network.encoder.embedding, model.encoder.embedding
    for name in ("weight", "bias"):
        known, new, other = getattr(found, name)
        of_source = getattr(source, name)
        assert known.equal(of_source[SERIES.index("T2w")]) and other.equal(of_source[SERIES.index("FLAIR")])
        torch.testing.assert_close(new, of_source.mean(0))
    how = {row.name: row.how for row in rows}
    assert "from T2w" in how["embedding.weight[T2w]"] and "mean of FLAIR, T1w, T2w" in how["embedding.bias[DWI]"]
    assert {row.name.split("[")[0] for row in rows} == set(network.encoder.state_dict())
    # every place and series has the features it had
    order = [SERIES.index("T2w"), SERIES.index("FLAIR")]
    fewer, architecture = downstream(series=["T2w", "FLAIR"], architecture=BY_SERIES)
    transfer(read_encoder(str(path)), fewer.encoder, architecture)
    volume = random_volume()
    volume[:, SERIES.index("T1w")] = 0
    with torch.no_grad():
        present = series_present(volume)
        expected = model.encoder.levels(volume, present)[-1].tokens[:, order]
        found = fewer.encoder.levels(volume[:, order], present[:, order])[-1].tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [(SERIES, ["T1w"]), (["T1w"], SERIES)], ids=["to one", "from one"])
def test_the_layer_of_one_series_alone_is_carried(tmp_path, source, target):
    model, path = pretrained(tmp_path, csm_plans(series=source, architecture=BY_SERIES))
    network, architecture = downstream(series=target, architecture=BY_SERIES)
    transfer(read_encoder(str(path)), network.encoder, architecture)
    for name in ("weight", "bias"):
        found, expected = getattr(network.encoder.embedding, name), getattr(model.encoder.embedding, name)
        assert found[target.index("T1w")].equal(expected[source.index("T1w")])


# --- what does not -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_size": (4, 4, 2)}, r"token_size is \(2, 4, 2\), expected \(4, 4, 2\)"),
        ({"architecture": {"width": 36}}, "width is 24, expected 36"),
        ({"architecture": {"depth": 4}}, "depth is 3, expected 4"),
        ({"architecture": {"num_heads": 4}}, "num_heads is 2, expected 4"),
        ({"architecture": {"encoder": {"kind": "joint_vit"}}}, r"encoder\.kind is vit, expected joint_vit"),
        ({"architecture": {"encoder": {"positions": "mae"}}}, r"encoder\.positions is geometric, expected mae"),
        ({"architecture": {"encoder": {"embedding": "by_series"}}}, r"encoder\.embedding is shared, expected by_series"),
    ],
)
def test_another_network_is_refused(tmp_path, changes, message):
    refused(pretrained(tmp_path)[1], message, **changes)


@pytest.mark.parametrize("content", [b"", b"epoch,loss\n1,0.5\n", b'{"a": 1}', b"\x80\x04\x95garbage", bytes(range(256))])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(content)
    refused(path, "not readable as a checkpoint.*expected a checkpoint written by one of our trainers")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    _, path = pretrained(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "not readable as a checkpoint")


@pytest.mark.parametrize("content", [{"a": torch.zeros(2)}, {"network_weights": {}}, torch.zeros(3), [1, 2]])
def test_a_file_of_other_tensors_is_refused(tmp_path, content):
    path = tmp_path / "tensors.pth"
    torch.save(content, path)
    refused(path, "not a training checkpoint.*expected a checkpoint written by")


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_not_run(tmp_path):
    path = tmp_path / "module.pth"
    torch.save({"network_weights": nn.Linear(1, 1)}, path)
    refused(path, "not readable as a checkpoint")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "checkpoint_final.pth", "no such checkpoint")


def test_a_checkpoint_without_an_encoder_of_ours_is_refused(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    checkpoint.save(checkpoint_of(csm_plans(), {"decoder.weight": torch.zeros(2)}), path)
    refused(path, "without an encoder of ours")


def test_a_checkpoint_of_nnunets_own_trainer_is_refused(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    checkpoint.save(checkpoint_of(base_plans(), {"encoder.stages.0.weight": torch.zeros(2)}), path)
    refused(path, "without an encoder of ours")


@pytest.mark.parametrize(
    "name", ["encoder.norm.weight", "encoder.blocks.1.attn.qkv.bias", "encoder.series_embedding", "encoder.embedding.weight"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_the_tensor_named(tmp_path, name):
    model, path = pretrained(tmp_path)
    weights = {k: v for k, v in model.state_dict().items() if k != name}
    checkpoint.save(checkpoint_of(csm_plans(), weights), path)
    refused(path, name.removeprefix("encoder.").replace(".", r"\."))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("encoder.norm.extra", r"norm\.extra"),
        ("encoder.norm.weight", r"norm\.weight"),
        ("encoder.series_embedding", "the encoder holds 2 series, it names 3"),
    ],
)
def test_a_checkpoint_with_a_tensor_too_many_or_of_another_shape_is_refused_and_named(tmp_path, name, what):
    model, path = pretrained(tmp_path)
    checkpoint.save(checkpoint_of(csm_plans(), {**model.state_dict(), name: torch.zeros(2, 3)}), path)
    refused(path, what)
