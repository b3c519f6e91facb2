"""Flow-matching transformers of diffusers: Stable Diffusion 3 and Flux."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from teachers import latents, loading
from teachers.diffusion import DiffusionTeacher, View
from teachers.tap import first_tensor

TEXT_LENGTH = {SD3Transformer2DModel: 77 + 256, FluxTransformer2DModel: 512}  # the pipelines' own
PATCH = 2  # of Flux: its pipeline packs the latents, its config knows nothing of it


def flow(path: str, *, revision: str | None = None, **view: Unpack[View]) -> DiffusionTeacher:
    """A transformer trained by flow matching (SD3 or Flux), shown no text.

    Zeros replace the text, as many as the pipeline has tokens. SD3 was trained so where captions
    were dropped (Esser et al. 2024), and its pipeline replaces a missing text encoder so. Flux was
    not trained this way; for it zeros come nearest to no text. A Flux with a guidance input (dev)
    gets 1, no guidance. No text encoder is read.

    `random_weights` only refreshes the transformer: the autoencoder stays trained, as it defines
    the space of the inputs.

    Args:
        path: a pipeline folder (model_index.json, transformer/, vae/, scheduler/), or a hub id.
        revision: branch, tag or commit, for a hub id.
        view: see `teachers.diffusion.View`; layers are `transformer_blocks.5` and, of Flux,
            `single_transformer_blocks.20`: their image tokens, as a map.

    Raises:
        ValueError, OSError: see `DiffusionTeacher` and `FlowTransformer`.
    """
    return DiffusionTeacher(FlowTransformer(path, revision), **view)


class FlowTransformer:
    """The family of `flow`, with its arguments (a `diffusion.Family`).

    Raises:
        OSError: a folder or file is missing, or the hub does not have it.
        ValueError: neither SD3 nor Flux, one that sees more than the latents (such as Flux Fill),
            or a scheduler that is not flow matching.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        root = loading.pipeline_folder(path, revision, ("transformer", "vae"))
        self.root, self.name = root, Path(path).name
        self.architecture = _architecture(root / "model_index.json")
        self.is_flux = self.architecture is FluxTransformer2DModel
        self.config = loading.read_config(root / "transformer", self.architecture)
        self.vae_config = latents.read_config(root)
        self.patch = PATCH if self.is_flux else self.config["patch_size"]
        given = self.config["in_channels"]
        made = self.vae_config["latent_channels"] * (PATCH**2 if self.is_flux else 1)
        if given != made:
            raise ValueError(
                f"{root / 'transformer' / 'config.json'}: the transformer has {given} input "
                f"channels, but the autoencoder has {made}; a teacher must see only the latents"
            )
        self.noise_schedule = loading.load_schedule(root / "scheduler")
        if self.noise_schedule.prediction_type != "flow":
            raise ValueError(
                f"{root / 'scheduler' / 'scheduler_config.json'} is not a flow-matching scheduler; "
                "it must be a FlowMatchEulerDiscreteScheduler"
            )
        self.configs: Mapping[str, Any] = {
            "transformer": self.config,
            "vae": self.vae_config,
            "scheduler": loading.without_bookkeeping(root / "scheduler" / "scheduler_config.json"),
        }
        reduction = latents.reduction(self.vae_config)
        self.multiple = reduction * self.patch
        self.coarsest = self.multiple
        self.image_size = None if self.is_flux else self.config["sample_size"] * reduction
        self.classes = 0
        self.text_length = TEXT_LENGTH[self.architecture]

    def build(self) -> nn.ModuleDict:
        """The parts without trained weights: the transformer and the autoencoder."""
        network = self.architecture.from_config(self.config)
        return nn.ModuleDict(
            {"network": network, "vae": AutoencoderKL.from_config(self.vae_config)}
        )

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with trained weights; with a seed, the transformer's are fresh."""
        if random_weights is None:
            network = loading.load_model(self.root / "transformer", self.architecture)
        else:
            network = loading.randomly(
                lambda: self.architecture.from_config(self.config), random_weights
            )
        vae = loading.load_model(self.root / "vae", AutoencoderKL)
        return nn.ModuleDict({"network": network, "vae": vae})

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """The input of the network: the latents, shifted and scaled."""
        return latents.encode(parts["vae"], images)

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run the transformer.

        Raises:
            ValueError: an image has as many patches as the text has tokens or, for SD3, more
                positions than the network knows.
        """
        grid, most = self._grid(x), self.config.get("pos_embed_max_size")
        if most and max(grid) > most:
            height, width, side = (self.multiple * count for count in (*grid, most))
            raise ValueError(
                f"image size {height}x{width} is larger than the {side}x{side} that this teacher "
                "has positions for"
            )
        if math.prod(grid) == self.text_length:
            height, width = (self.multiple * count for count in grid)
            raise ValueError(
                f"image size {height}x{width} gives {self.text_length} patches, as many as the "
                "text has tokens, so the two cannot be told apart; choose another size"
            )
        text = {
            "encoder_hidden_states": x.new_zeros(
                len(x), self.text_length, self.config["joint_attention_dim"]
            ),
            "pooled_projections": x.new_zeros(len(x), self.config["pooled_projection_dim"]),
        }
        if not self.is_flux:
            return parts["network"](x, timestep=times, **text)
        rows, columns = (torch.arange(side, device=x.device) for side in grid)
        places = torch.cartesian_prod(rows[:1], rows, columns)  # (h w, 3): 0, row, column
        return parts["network"](
            F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2),  # (B, h w, 4 c)
            timestep=times / len(self.noise_schedule),
            img_ids=places,
            txt_ids=places.new_zeros(self.text_length, 3),
            guidance=x.new_ones(len(x)) if self.config["guidance_embeds"] else None,
            **text,
        )

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """Image tokens (B, h w, C) as a map: blocks return them last in a tuple, after the text's.

        Flux's single blocks work on one sequence of text and image tokens, the image's last.
        """
        grid = self._grid(x)
        image = math.prod(grid)
        for tokens in reversed(output if isinstance(output, tuple) else (output,)):
            shape = tokens.shape if isinstance(tokens, Tensor) else ()
            if len(shape) == 3 and shape[1] in (image, self.text_length + image):
                return tokens[:, -image:].transpose(1, 2).unflatten(2, grid)
        return first_tensor(output)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the latents x in patches."""
        return x.shape[-2] // self.patch, x.shape[-1] // self.patch


def _architecture(index: Path) -> Any:
    """The class of the pipeline's transformer, by its model_index.json."""
    given = loading.read_json(index).get("transformer")
    known = {architecture.__name__: architecture for architecture in TEXT_LENGTH}
    for name, architecture in known.items():
        if given == ["diffusers", name]:
            return architecture
    raise ValueError(
        f"{index}: transformer is {given!r}; it must be diffusers' {' or '.join(known)}"
    )
