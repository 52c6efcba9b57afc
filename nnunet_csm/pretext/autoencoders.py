"""Autoencoders for comparison: plain, variational (Kingma and Welling 2014), with a codebook (van den Oord et al. 2017).

They see whole patches and rebuild them through a bottleneck. The papers that compare with them do not give their settings:
network and sizes are ours, see docs/methods.md.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.data.intensities import percentile_range, scaled
from nnunet_csm.errors import UserError
from nnunet_csm.figures.reconstructions import save_restoration
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.pyramid import Norm, Residual, ResidualUNet, convolution
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import NOTHING_HIDDEN, Batch, Drawn, Pretext, Setup
from nnunet_csm.schema import Count, NotNegative, ShareBelowOne, Size, Width

# of a variational autoencoder's log variance
LOWEST, HIGHEST = -30.0, 20.0
# keeps the share of a code that is hardly used above 0 (Laplace's smoothing)
SMOOTHING = 1e-5


@dataclass(frozen=True)
class Settings:
    """The plain autoencoder's.

    Attributes:
        latent_channels: numbers that are kept of each token.
    """

    latent_channels: Width = 8


@dataclass(frozen=True)
class VariationalSettings(Settings):
    """The variational one's.

    Attributes:
        kl_weight: of the divergence from a standard normal distribution, summed over what is kept of a patch and divided by the
            voxels of a series.
    """

    kl_weight: NotNegative = 1e-6


@dataclass(frozen=True)
class CodebookSettings:
    """Those of the autoencoder with a codebook, which learns codes by running means.

    Attributes:
        num_codes: in the codebook.
        code_width: numbers of a code.
        commitment: weight of the mean squared distance of what is kept from its codes.
        decay: of the running means, by step.
        idle_steps: after so many steps without use, a code becomes what is kept at some place of the batch.
    """

    num_codes: Width = 512
    code_width: Width = 64
    commitment: NotNegative = 0.25
    decay: ShareBelowOne = 0.99
    idle_steps: Count = 100


@dataclass(frozen=True)
class There(Drawn):
    """What the loss needs to know of a batch: nothing is drawn."""

    there: Bool[Tensor, "b s"]
    """Series of which there is something in the patch."""


@dataclass(frozen=True)
class Candidates(There):
    """What a code becomes that is not used any more: of all samples of the batch, that which has the highest rank for it."""

    rank: Int[Tensor, "b c"]
    place: Float[Tensor, "b c"]
    """Where in the sample, as a share of its places."""


class Stage(nn.Module):
    """Residual blocks at one level, and the way up to the next finer one: trilinear, then a convolution; none from the finest."""

    def __init__(self, encoder: ResidualUNet, level: int, depth: int) -> None:
        super().__init__()
        widths, kernels = encoder.level_widths, encoder.kernels
        self.blocks = nn.Sequential(*(Residual(widths[level], kernels[level], nn.SiLU) for _ in range(depth)))
        self.stride: Size | None = encoder.strides[level - 1] if level else None
        self.up = convolution(widths[level], widths[level - 1], kernels[level - 1]) if level else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.stride is not None:
            x = F.interpolate(x, scale_factor=tuple(map(float, self.stride)), mode="trilinear")
        return self.up(x)


class Autoencoder(Pretext):
    """Encoder, bottleneck, and a decoder that mirrors the encoder, without anything past the bottleneck.

    Input are z-scored voxels, the target is intensities from 0 to 1 (`percentile_range`), the loss the mean squared error over
    the series of which there is something in the patch. Absent ones are zeros in the input, and what comes out for them does
    not count.

    Attributes:
        num_above: levels of the decoder that lie before the bottleneck.
    """

    Draw: ClassVar[type[There]] = There
    num_above: ClassVar[int] = 0
    encoder: ResidualUNet

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        a = setup.architecture
        self.encoder = build_encoder(a)  # type: ignore[assignment]
        levels = range(len(self.encoder.level_widths))
        self.decoder = nn.ModuleList(Stage(self.encoder, level, a.depth) for level in reversed(levels))
        kept, told = self.channels(setup.settings)
        width = self.encoder.level_widths[-1 - self.num_above]
        self.to_latent, self.from_latent = nn.Conv3d(width, told, 1), nn.Conv3d(kept, width, 1)
        finest = self.encoder.level_widths[0]
        last = nn.Conv3d(finest, len(a.series), 1)
        # in the middle of the intensities, which small steps would take long to get to
        nn.init.constant_(last.bias, 0.5)  # type: ignore[arg-type]
        self.head = nn.Sequential(Norm(finest), nn.SiLU(), last)

    @classmethod
    @abstractmethod
    def channels(cls, settings: Any) -> tuple[int, int]:
        """Numbers that are kept of each place, and that the encoder tells."""

    @abstractmethod
    def bottleneck(self, told: Float[Tensor, "b c z y x"], drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder is given, and further terms (b) of the loss by their names in `parts`."""

    def total(self, terms: Mapping[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
        """The loss of each sample, of the error and its further terms."""
        return terms["error"]

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        if architecture.encoder.kind != "residual_unet":
            raise UserError(
                f"{where}: {cls.__name__} mirrors its encoder, but encoder.kind in arch_kwargs is "
                f"{architecture.encoder.kind!r}; set it to 'residual_unet', and decoder to 'unet'"
            )

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        settings = ", ".join(f"{name} {value:g}" for name, value in vars(setup.settings).items())
        return [("bottleneck", cls.__name__, f"{settings}; whole patches of all series, target: intensities from 0 to 1")]

    def draw(self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool) -> Any:
        return There(volumes[0].flatten(2).any(2))

    def image(self, volume: Float[Tensor, "b s z y x"], drawn: There) -> tuple[Float[Tensor, "b s z y x"], dict[str, Tensor]]:
        """Rebuilt intensities, and the further terms of the loss."""
        *_, finer, x = self.encoder.maps(volume.float())
        for stage in self.decoder[: self.num_above]:
            x = stage(x) + finer
        kept, terms = self.bottleneck(self.to_latent(x), drawn)
        x = self.from_latent(kept)
        for stage in self.decoder[self.num_above :]:
            x = stage(x)
        return self.head(x).float(), terms

    def terms(self, volume: Float[Tensor, "b s z y x"], drawn: There) -> dict[str, Float[Tensor, " b"]]:
        """The terms of the loss, of each sample."""
        image, terms = self.image(volume, drawn)
        of_series = (image - scaled(volume, *percentile_range(volume))).square().mean((2, 3, 4)) * drawn.there
        return {"error": of_series.sum(1) / drawn.there.sum(1).clamp(min=1), **terms}

    def forward(self, *batch: Any) -> Float[Tensor, ""]:
        return self.total(self.terms(*batch)).sum()

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        terms, num = self.terms(*batch.args), self.weight(batch.drawn)
        sums = {"loss": self.total(terms), **{name: terms[name] for name in self.parts if name in terms}}
        return {name: (of_samples.sum(), num) for name, of_samples in sums.items()}

    @torch.no_grad()
    def rebuilt(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Everything, in the units of the input."""
        (volume,), drawn = batch.volumes, batch.drawn
        low, high = percentile_range(volume)
        image = self.image(volume, drawn)[0] * (high - low) + low  # type: ignore[arg-type]
        return {NOTHING_HIDDEN: (image, drawn.tensors[0][..., None, None, None].expand_as(image))}

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        return float(self.setup.num_tokens)

    @torch.no_grad()
    def picture(self, path: Path, batch: Batch, title: str) -> None:
        """The patch from 0 to 1, as the encoder is given it, what was rebuilt and the difference, a row for each series."""
        (volume,) = batch.volumes
        image = self.image(*batch.args)[0].clamp(0, 1)
        true, seen, rebuilt = (t[0].float().cpu().numpy() for t in (scaled(volume, *percentile_range(volume)), volume, image))
        present = np.asarray(seen.any(axis=(1, 2, 3)))
        save_restoration(path, true, seen, rebuilt, self.setup.architecture.series, present, title)


class AE(Autoencoder):
    """A bottleneck of few channels at each token."""

    Settings = Settings

    @classmethod
    def channels(cls, settings: Any) -> tuple[int, int]:
        return settings.latent_channels, settings.latent_channels

    def bottleneck(self, told: Tensor, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return told, {}


class VAE(Autoencoder):
    """A normal distribution at each token, drawn from in training; otherwise its mean is taken."""

    Settings = VariationalSettings
    parts = ("error", "kl")
    # what is drawn from the distributions
    network_draws = True

    @classmethod
    def channels(cls, settings: Any) -> tuple[int, int]:
        return settings.latent_channels, 2 * settings.latent_channels

    def bottleneck(self, told: Tensor, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_variance = told.float().chunk(2, 1)
        log_variance = log_variance.clamp(LOWEST, HIGHEST)
        divergence = kl_from_standard_normal(mean, log_variance).flatten(1).sum(1)
        if self.training:
            mean = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        z, y, x = self.setup.patch_size
        return mean, {"kl": divergence / (z * y * x)}

    def total(self, terms: Mapping[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
        return terms["error"] + self.settings.kl_weight * terms["kl"]


def kl_from_standard_normal(mean: Float[Tensor, "*n"], log_variance: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Kullback-Leibler divergence of each normal distribution from that of mean 0 and variance 1, in nats."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


class VQVAE(Autoencoder):
    """A codebook at the level one finer than tokens: what is kept of a place is the number of a code.

    The coarsest map goes up a level, through the first stage of the decoder, and is added to the finer one before the bottleneck,
    so that all of the encoder learns and as many parameters do as in the others. Codes are running means of what they stand for:
    sums are kept of every step, over its parts and ranks, and `after_step` moves the codes. Validation moves nothing.
    """

    Settings = CodebookSettings
    Draw = Candidates
    parts = ("error", "commitment", "perplexity")
    num_above = 1
    codes: Tensor
    uses: Tensor
    totals: Tensor
    idle: Tensor
    counted: Tensor
    summed: Tensor
    best_rank: Tensor
    candidates: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        num, width = setup.settings.num_codes, setup.settings.code_width
        codes = torch.randn(num, width)
        running = {"codes": codes, "uses": torch.ones(num), "totals": codes.clone(), "idle": torch.zeros(num)}
        for name, values in running.items():
            self.register_buffer(name, values)
        # of this step: how often each code was used and the sum of what it stood for, and the candidates to replace it
        of_step = {"counted": torch.zeros(num), "summed": torch.zeros(num, width), "candidates": torch.zeros(num, width)}
        for name, values in (of_step | {"best_rank": torch.full((num,), -1)}).items():
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def channels(cls, settings: Any) -> tuple[int, int]:
        return settings.code_width, settings.code_width

    def draw(
        self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool
    ) -> Candidates:
        num = self.settings.num_codes
        there = super().draw(draws, present, variant, volumes, training).there
        return Candidates(there, draws.integers(What.TOKENS, num), draws.uniform(What.TOKENS, num, first=num))

    def bottleneck(self, told: Tensor, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        # 16 bits would not tell near codes apart
        with torch.autocast(told.device.type, enabled=False):
            vectors = told.float().flatten(2).mT
            numbers = nearest(vectors, self.codes)
            chosen = self.codes[numbers]
            if self.training:
                self.count(vectors.detach(), numbers, drawn)
            commitment = (vectors - chosen).square().mean((1, 2))
        # the gradient of what follows goes straight to what was told
        kept = vectors + (chosen - vectors).detach()
        return kept.mT.reshape(told.shape), {"commitment": commitment}

    def count(self, vectors: Float[Tensor, "b n w"], numbers: Int[Tensor, "b n"], drawn: Candidates) -> None:
        """Add what `after_step` needs of some samples."""
        used = (numbers.flatten()[:, None] == torch.arange(len(self.codes), device=numbers.device)).float()
        self.counted += used.sum(0)
        self.summed += used.T @ vectors.flatten(0, 1)
        place = (drawn.place * vectors.shape[1]).long()
        rank, sample = drawn.rank.max(0)
        there = vectors.gather(1, place[..., None].expand(-1, -1, vectors.shape[2]))
        found = there.gather(0, sample[None, :, None].expand(1, -1, vectors.shape[2]))[0]
        self.candidates.copy_(torch.where((rank > self.best_rank)[:, None], found, self.candidates))
        self.best_rank.copy_(torch.maximum(rank, self.best_rank))

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Move the codes to the running means, and replace those that were idle for long."""
        s = self.settings
        if dist.is_available() and dist.is_initialized():
            mine = self.best_rank.clone()
            dist.all_reduce(self.best_rank, dist.ReduceOp.MAX)
            self.candidates.mul_((mine == self.best_rank)[:, None])
            for summed in (self.counted, self.summed, self.candidates):
                dist.all_reduce(summed)
        self.uses.lerp_(self.counted, 1 - s.decay)
        self.totals.lerp_(self.summed, 1 - s.decay)
        num = self.uses.sum()
        smoothed = (self.uses + SMOOTHING) / (num + len(self.uses) * SMOOTHING) * num
        self.idle.add_(1).mul_(self.counted == 0)
        dead = self.idle >= s.idle_steps
        for values, fresh in ((self.uses, 1.0), (self.idle, 0.0)):
            values.masked_fill_(dead, fresh)
        self.totals.copy_(torch.where(dead[:, None], self.candidates, self.totals))
        self.codes.copy_(torch.where(dead[:, None], self.candidates, self.totals / smoothed[:, None]))
        for of_step, empty in ((self.counted, 0), (self.summed, 0), (self.candidates, 0), (self.best_rank, -1)):
            of_step.fill_(empty)

    def total(self, terms: Mapping[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
        return terms["error"] + self.settings.commitment * terms["commitment"]

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        num = self.weight(batch.drawn)
        return {**super().validate(batch), "perplexity": (perplexity(self.uses) * num, num)}


def nearest(vectors: Float[Tensor, "b n w"], codes: Float[Tensor, "c w"]) -> Int[Tensor, "b n"]:
    """The number of the code that is nearest to each vector."""
    return (codes.square().sum(1) / 2 - vectors @ codes.T).argmin(-1)


def perplexity(uses: Float[Tensor, " c"]) -> Float[Tensor, ""]:
    """How many codes are in use: the number of equally frequent ones that has the entropy of these. From 1 to all of them."""
    share = uses / uses.sum()
    return (-torch.xlogy(share, share).sum()).exp()
