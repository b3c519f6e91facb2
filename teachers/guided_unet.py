"""The UNet of guided diffusion, written from the papers that describe it.

Dhariwal & Nichol 2021 (ADM, section 3 and appendix), based on Nichol & Dhariwal 2021. Modules have
the names of the tensors in OpenAI's checkpoints, so that these load unchanged and layers keep their
usual names: `input_blocks.7`, `middle_block`, `output_blocks.3`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32  # of every GroupNorm


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that defines the network.

    Attributes:
        channels: base channels, also those of the timestep's sinusoids.
        level_channels: channels of each resolution, finest first; all multiples of 32.
        attention: whether each resolution has attention.
        res_blocks: residual blocks per resolution on the way down; one more on the way up.
        scale_shift: the timestep scales and shifts the normalised map, instead of being added.
        residual_resampling: residual blocks change the resolution, instead of convolutions.
        out_channels: 3, or 6 with the learned variance.
        head_channels: channels per attention head; not used with `heads`.
        heads: number of attention heads, equal at every resolution.
        new_attention_order: see `split_heads`.
    """

    channels: int
    level_channels: tuple[int, ...]
    attention: tuple[bool, ...]
    res_blocks: int
    scale_shift: bool
    residual_resampling: bool
    out_channels: int
    head_channels: int = 64
    heads: int | None = None
    new_attention_order: bool = False


class GuidedUNet(nn.Module):
    """The unconditional network.

    Fresh weights are torch's defaults: with the papers' zeros at the end of every block an
    untrained network would not see its timestep.

    Raises:
        ValueError: channels that are not divisible by the groups of a norm, or by the heads.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        if any(width % GROUPS for width in a.level_channels):
            raise ValueError(f"channels must be multiples of {GROUPS}, got {a.level_channels}")
        self.time_embed = nn.Sequential(
            nn.Linear(a.channels, 4 * a.channels),
            nn.SiLU(),
            nn.Linear(4 * a.channels, 4 * a.channels),
        )
        top, bottom = a.level_channels[0], a.level_channels[-1]
        channels, skips = top, [top]
        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(3, top, 3, padding=1)])])
        for level, width in enumerate(a.level_channels):
            for _ in range(a.res_blocks):
                self.input_blocks.append(Block(self._layers(level, channels)))
                channels = width
                skips.append(channels)
            if level < len(a.level_channels) - 1:
                self.input_blocks.append(Block([self._down(channels)]))
                skips.append(channels)
        self.middle_block = Block(
            [self._residual(bottom, bottom), Attention(bottom, a), self._residual(bottom, bottom)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(a.level_channels))):
            for index in range(a.res_blocks + 1):
                layers = self._layers(level, channels + skips.pop())
                channels = a.level_channels[level]
                if level and index == a.res_blocks:
                    layers.append(self._up(channels))
                self.output_blocks.append(Block(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, top), nn.SiLU(), nn.Conv2d(top, a.out_channels, 3, padding=1)
        )

    def _layers(self, level: int, channels: int) -> list[nn.Module]:
        width = self.architecture.level_channels[level]
        layers: list[nn.Module] = [self._residual(channels, width)]
        if self.architecture.attention[level]:
            layers.append(Attention(width, self.architecture))
        return layers

    def _residual(
        self, channels: int, width: int, resample: nn.Module | None = None
    ) -> ResidualBlock:
        a = self.architecture
        return ResidualBlock(channels, width, 4 * a.channels, a.scale_shift, resample)

    def _down(self, channels: int) -> nn.Module:
        if self.architecture.residual_resampling:
            return self._residual(channels, channels, nn.AvgPool2d(2))
        convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        return nn.Sequential(OrderedDict(op=convolution))

    def _up(self, channels: int) -> nn.Module:
        repeat = nn.Upsample(scale_factor=2, mode="nearest")
        if self.architecture.residual_resampling:
            return self._residual(channels, channels, repeat)
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        return nn.Sequential(OrderedDict(repeat=repeat, conv=convolution))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Predict. x: (B, 3, H, W), times: (B,) -> (B, out_channels, H, W)."""
        sinusoids = get_timestep_embedding(
            times,
            self.architecture.channels,
            flip_sin_to_cos=True,  # cosines first
            downscale_freq_shift=0,
        )
        embedding = self.time_embed(sinusoids.to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        prediction: Tensor = self.out(x)
        return prediction


class Block(nn.ModuleList):
    """A sequence of layers whose residual blocks also see the timestep."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C, H, W), embedding: (B, E) -> (B, C', H', W')."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, after BigGAN's (Brock et al. 2019) where it resamples."""

    def __init__(
        self,
        channels: int,
        width: int,
        embedding: int,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, 2 * width if scale_shift else width)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Identity(),  # the dropout's place: it rests in a teacher
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C, H, W), embedding: (B, E) -> (B, C', H', W')."""
        norm, activation, convolution = self.in_layers
        h = convolution(self.resample(activation(norm(x))))
        signal = self.emb_layers(embedding)[:, :, None, None]  # (B, C' or 2 C', 1, 1)
        norm, activation, _, convolution = self.out_layers
        if self.scale_shift:  # adaptive group normalisation, ADM's eq. 3
            scale, shift = signal.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + signal)
        out: Tensor = self.skip_connection(self.resample(x)) + convolution(activation(h))
        return out


class Attention(nn.Module):
    """Self-attention over all positions, with a shortcut.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(self, channels: int, architecture: Architecture) -> None:
        super().__init__()
        heads, size = architecture.heads, architecture.head_channels
        divisor = size if heads is None else heads
        if divisor < 1 or channels % divisor:
            what = f"head_channels {size}" if heads is None else f"heads {heads}"
            raise ValueError(
                f"{what} does not divide the {channels} channels of an attention layer; give the "
                "value that the model was trained with (it cannot be read from the weights)"
            )
        self.heads = channels // size if heads is None else heads
        self.new_order = architecture.new_attention_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3 C, N)
        h = F.scaled_dot_product_attention(*split_heads(qkv, self.heads, self.new_order))
        h = self.proj_out(h.transpose(2, 3).flatten(1, 2))  # (B, C, N)
        out: Tensor = x + h.reshape(x.shape)
        return out


def split_heads(qkv: Tensor, heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split (B, 3 C, N) into queries, keys and values, (B, heads, N, C / heads) each.

    In the new order the channels are all heads' queries, then all keys, then all values; in the
    old one the first head's queries, keys and values, then the second's, and so on.
    """
    size = qkv.shape[1] // (3 * heads)
    kinds = (3, heads) if new_order else (heads, 3)
    split = qkv.reshape(len(qkv), *kinds, size, -1).transpose(3, 4)
    queries, keys, values = split.unbind(1 if new_order else 2)
    return queries, keys, values
