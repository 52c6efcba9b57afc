"""Weights of BM-MAE in our ViT: the same features, all tensors or none. Its own files cannot be had here; these are made up."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import nnunet_csm
from nnunet_csm import checkpoint
from nnunet_csm.cli import main
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.transfer import HOW_WEIGHTS_BEGAN, read_encoder, transfer
from nnunet_csm.planning.presets import read_preset
from nnunet_csm.plans import Architecture, EncoderSettings
from nnunet_csm.sharing.bm_mae import bring_in, entries_in_our_order

# as published but for width, depth and tokens of 16 voxels, 8 along each axis
WIDTH, HIDDEN, DEPTH, HEADS, EDGE, PLACES = 384, 768, 2, 6, 4, 3
NAMES = ("t1", "t1ce", "t2", "flair")
Weights = dict[str, Tensor]


def their_positions() -> Tensor:
    """MONAI's table: sines and cosines of the second axis, then of the first, then of the third."""
    n = WIDTH // 6
    frequency = 10_000.0 ** -(torch.arange(n) / n)
    first, second, third = (
        axis.flatten()[:, None] * frequency for axis in torch.meshgrid(*[torch.arange(PLACES)] * 3, indexing="ij")
    )
    return torch.cat([part for angle in (second, first, third) for part in (angle.sin(), angle.cos())], dim=1)[None]


def their_weights() -> Weights:
    """The state of a BM-MAE as its code builds it, with MONAI 1.3, and as its pretraining saves it; all numbers drawn."""
    draws = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws) / math.sqrt(max(math.prod(shape[1:]), 1))

    weights = {"cls_token": draw(1, 1, WIDTH), "decoder.mask_token": draw(1, 1, 12), "decoder.head.weight": draw(5, 12)}
    for name in NAMES:
        start = f"tokenizers.{name}.patch_embedding"
        weights[f"{start}.position_embeddings"] = their_positions()
        weights[f"{start}.patch_embeddings.weight"] = draw(WIDTH, 1, EDGE, EDGE, EDGE)
        weights[f"{start}.patch_embeddings.bias"] = draw(WIDTH)
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.linear1": (HIDDEN, WIDTH),
        "mlp.linear2": (WIDTH, HIDDEN),
        "attn.out_proj": (WIDTH, WIDTH),
    }
    shapes |= {"attn.qkv": (3 * WIDTH, WIDTH), "norm1": (WIDTH,), "norm2": (WIDTH,)}
    for number in range(DEPTH):
        for name, shape in shapes.items():
            weights[f"blocks.{number}.{name}.weight"] = draw(*shape) * (0.2 if "norm" in name else 1) + ("norm" in name)
            weights[f"blocks.{number}.{name}.bias"] = 0.1 * draw(shape[0])
    return weights | {"norm.weight": 1 + 0.2 * draw(WIDTH), "norm.bias": 0.1 * draw(WIDTH)}


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, bias)


def their_features(weights: Weights, volumes: dict[str, Tensor]) -> Tensor:
    """(series, places in the order x, y, z, entries), without the class token, as its segmenter encodes; volumes (x, y, z)."""
    parts = []
    for name, volume in volumes.items():
        start = f"tokenizers.{name}.patch_embedding"
        kernel, bias = (weights[f"{start}.patch_embeddings.{what}"] for what in ("weight", "bias"))
        parts.append(
            F.conv3d(volume[None, None], kernel, bias, stride=EDGE).flatten(2).mT + weights[f"{start}.position_embeddings"]
        )
    x = torch.cat(parts, dim=1)
    for number in range(DEPTH):
        of = {
            name: [weights[f"blocks.{number}.{name}.{what}"] for what in ("weight", "bias")]
            for name in ("norm1", "norm2", "attn.qkv", "attn.out_proj", "mlp.linear1", "mlp.linear2")
        }
        qkv = F.linear(normed(x, *of["norm1"]), *of["attn.qkv"])
        query, key, value = rearrange(qkv, "b k (three h d) -> three b h k d", three=3, h=HEADS)
        attention = (query @ key.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        x = x + F.linear(rearrange(attention @ value, "b h k d -> b k (h d)"), *of["attn.out_proj"])
        x = x + F.linear(F.gelu(F.linear(normed(x, *of["norm2"]), *of["mlp.linear1"])), *of["mlp.linear2"])
    return normed(x, weights["norm.weight"], weights["norm.bias"])[0].unflatten(0, (len(volumes), -1))


def bring(weights: Weights, tmp_path: Path, name: str = "bmmae.pth") -> Path:
    """Their file, brought in by the command."""
    path, folder = tmp_path / name, tmp_path / "brought"
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    assert main(["import_weights", "-from", "bm_mae", "-i", str(path), "-o", str(folder), "--overwrite"]) == 0
    return folder


@pytest.mark.parametrize("names", [NAMES, ("t2", "t1ce"), ("flair",)])
def test_features_are_theirs(tmp_path: Path, names: tuple[str, ...]) -> None:
    weights = their_weights()
    encoder = nnunet_csm.load_encoder(bring(weights, tmp_path))
    assert set(encoder.series) == {"T1w", "T1ce", "T2w", "FLAIR"} and encoder.token_size == (4, 4, 4)
    ours = dict(zip(NAMES, ("T1w", "T1ce", "T2w", "FLAIR"), strict=True))
    draws = np.random.default_rng(0)
    volumes = {name: draws.normal(size=(12, 12, 12)).astype(np.float32) for name in names}
    # nnU-Net's axes are (z, y, x)
    found = encoder.features({ours[name]: volume.T for name, volume in volumes.items()}, normalize=False)
    expected = their_features(weights, {name: torch.from_numpy(volume) for name, volume in volumes.items()})
    expected = rearrange(expected, "s (x y z) e -> s (z y x) e", x=PLACES, y=PLACES, z=PLACES)[..., entries_in_our_order(WIDTH)]
    for number, name in enumerate(names):
        torch.testing.assert_close(found.tokens[found.series.index(ours[name])], expected[number], rtol=1e-4, atol=1e-4)


def test_names_and_numbers_are_those_of_monai(tmp_path: Path) -> None:
    blocks = pytest.importorskip("monai.networks.blocks", reason="MONAI is not installed")
    tokens = blocks.PatchEmbeddingBlock(1, (12,) * 3, (EDGE,) * 3, WIDTH, HEADS, proj_type="conv", pos_embed_type="sincos")
    block = blocks.TransformerBlock(WIDTH, HIDDEN, HEADS, qkv_bias=True)
    weights = their_weights()
    assert torch.allclose(tokens.position_embeddings, their_positions(), atol=1e-5)
    parts = {f"tokenizers.t1.patch_embedding.{name}": tensor for name, tensor in tokens.state_dict().items()}
    parts |= {f"blocks.0.{name}": tensor for name, tensor in block.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in parts.items() if "cross_attn" not in name}
    assert theirs == {name: weights[name].shape for name in theirs}
    for number in range(DEPTH):
        assert {n for n in weights if n.startswith(f"blocks.{number}.")} == {
            n.replace("s.0", f"s.{number}") for n in theirs if "blocks" in n
        }
    # what MONAI makes beside them since 1.4 is known
    bring({**weights, **{name: tensor for name, tensor in parts.items() if "norm_cross_attn" in name}}, tmp_path)


def test_an_encoder_by_itself_other_series_and_safetensors_will_do(tmp_path: Path) -> None:
    weights = {k: v for k, v in their_weights().items() if not k.startswith(("cls", "decoder", "tokenizers.t1."))}
    folder = bring(weights, tmp_path, "theirs.safetensors")
    assert nnunet_csm.load_encoder(folder).series == ("FLAIR", "T1ce", "T2w")


def test_a_network_of_the_same_size_starts_from_them_and_no_other(tmp_path: Path) -> None:
    pretrained = read_encoder(str(bring(their_weights(), tmp_path)))
    options = EncoderSettings(positions="mae", embedding="by_series", mlp_ratio=2.0, query_key_gain=0.0)
    size: dict[str, Any] = {
        "token_size": (4, 4, 4),
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "features": 4,
        "drop_path": 0.0,
    }
    fits = Architecture(("T2w", "FLAIR"), (1, 0), encoder=options, **size)
    encoder = build_encoder(fits)
    transfer(pretrained, encoder, fits)
    row = pretrained.architecture.series.index("T2w")
    assert torch.equal(encoder.state_dict()["embedding.weight"][0], pretrained.weights["embedding.weight"][row])
    for options in (EncoderSettings(positions="mae", embedding="by_series"), EncoderSettings(mlp_ratio=2.0)):
        other = Architecture(("T2w", "FLAIR"), (1, 0), encoder=options, **size)
        with pytest.raises(UserError, match=r"encoder\.(mlp_ratio|positions)"):
            transfer(pretrained, build_encoder(other), other)


def test_the_preset_plans_a_network_that_takes_them() -> None:
    options = read_preset("bm_mae").network["encoder"]
    published = bring_in(their_weights(), "here").arch_kwargs["encoder"]
    assert {name: value for name, value in options.items() if name not in HOW_WEIGHTS_BEGAN} == published


Change = Callable[[Weights], object]
START = "tokenizers.t1.patch_embedding"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), "has no blocks.1.attn.qkv.bias"),
        (lambda w: w.pop("blocks.0.mlp.linear1.weight"), "has no blocks.0.mlp.linear1.weight"),
        (lambda w: w.pop("norm.weight"), "has no norm.weight"),
        (lambda w: w.pop(f"{START}.position_embeddings"), "has no tokenizers.t1"),
        (lambda w: w.pop(f"{START}.patch_embeddings.weight"), "tokenizers.t1.*no tensor of BM-MAE"),
        (lambda w: w.update({"blocks.0.attn.rel_pos": torch.ones(3)}), "blocks.0.attn.rel_pos .* is no tensor"),
        (lambda w: w.update({"blocks.7.norm1.bias": torch.ones(3)}), "has no blocks.2"),
        (lambda w: w.update({"blocks.0.attn.qkv.weight": torch.ones(WIDTH, WIDTH)}), "384 x 384, expected 1152 x 384"),
        (lambda w: w.update({"norm.bias": torch.ones(1, WIDTH)}), "norm.bias is 1 x 384"),
        (lambda w: w.update({"norm.bias": torch.ones(WIDTH, dtype=torch.int64)}), "norm.bias"),
        (lambda w: w.update({"norm.bias": torch.full((WIDTH,), torch.nan)}), "NaN"),
        (lambda w: w[f"{START}.position_embeddings"].mul_(1.01), "position_embeddings of t1"),
        (lambda w: w.update({f"{START}.position_embeddings": torch.zeros(1, 26, WIDTH)}), "position_embeddings of t1"),
        (lambda w: [w.pop(name) for name in list(w) if "tokenizers" in name], "expected the weights of BM-MAE"),
        (lambda w: w.update({f"{START}.patch_embeddings.weight": torch.ones(WIDTH, 1, 4, 4, 2)}), "expected"),
        (lambda w: w.update({3: torch.ones(1)}), "expected a dictionary of tensors"),
    ],
)
def test_a_part_or_another_file_is_refused_and_nothing_written(
    tmp_path: Path, change: Change, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = their_weights()
    change(weights)
    torch.save(weights, tmp_path / "theirs.pth")
    with pytest.raises(SystemExit) as stop:
        main(["import_weights", "-from", "bm_mae", "-i", str(tmp_path / "theirs.pth"), "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "theirs.pth") in said and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=complaint):
        raise UserError(said)


def test_a_file_that_executes_something_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    torch.save({"norm.weight": Evil()}, tmp_path / "theirs.pth")
    for name in ("theirs.pth", "missing.pth", "missing.safetensors"):
        with pytest.raises(SystemExit):
            main(["import_weights", "-from", "bm_mae", "-i", str(tmp_path / name), "-o", str(tmp_path / "out")])
        assert name in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_their_order_of_entries_is_a_permutation() -> None:
    assert torch.equal(entries_in_our_order(WIDTH).sort().values, torch.arange(WIDTH))
    brought = bring_in(their_weights(), "here")
    assert brought.grid == (3, 3, 3) and sorted(brought.left_out) == ["cls_token", "decoder.head.weight", "decoder.mask_token"]
    checkpoint.check_weights(brought.weights, "here", "")
