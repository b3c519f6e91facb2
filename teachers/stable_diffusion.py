"""Stable Diffusion 1.x, 2.x and SDXL: diffusers' `UNet2DConditionModel` in latent space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from teachers import anatomy, latents, loading, text
from teachers.diffusion import DiffusionTeacher, View
from teachers.tap import first_tensor

UNCONDITIONED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim")


def stable_diffusion(
    path: str,
    *,
    prompt: str = "",
    class_prompts: Sequence[str] | None = None,
    revision: str | None = None,
    **view: Unpack[View],
) -> DiffusionTeacher:
    """A text-to-image UNet of SD 1.x (epsilon), 2.x (v prediction) or SDXL, with an empty prompt.

    `random_weights` only refreshes the UNet: the autoencoder and the prompts stay trained, as they
    define the space of its inputs. The text encoders are needed while loading, then dropped.

    Args:
        path: a pipeline folder (unet/, vae/, scheduler/, text_encoder/ and tokenizer/, for SDXL
            text_encoder_2/ and tokenizer_2/ too), or a hub id.
        prompt: the caption of all images. The UNet was trained with the empty one where captions
            were dropped; for an SDXL whose model_index.json has `force_zeros_for_empty_prompt`, the
            empty one is embedded as zeros.
        class_prompts: one prompt per class. `features` uses the one of each image's label, and
            `prompt` if the label is negative or labels are None. Without these, labels are ignored.
        revision: branch, tag or commit, for a hub id.
        view: see `teachers.diffusion.View`; layers are `mid_block`, `up_blocks.1`,
            `down_blocks.2.attentions.0.transformer_blocks.0`, ...

    Raises:
        ValueError, OSError: see `DiffusionTeacher` and `TextUNet`.
    """
    return DiffusionTeacher(TextUNet(path, prompt, class_prompts, revision), **view)


class TextUNet:
    """The family of `stable_diffusion`, with its arguments (a `diffusion.Family`).

    Raises:
        OSError: a folder or file is missing, or the hub does not have it.
        ValueError: another kind of pipeline (such as inpainting or upscaling), prompts that are not
            a list of strings, or a prompt that is too long.
    """

    def __init__(
        self,
        path: str,
        prompt: str = "",
        class_prompts: Sequence[str] | None = None,
        revision: str | None = None,
    ) -> None:
        if class_prompts is not None and (isinstance(class_prompts, str) or not class_prompts):
            raise ValueError(
                f"class_prompts must be a list with one prompt per class, got {class_prompts!r}; "
                "leave it out to give all images the same prompt"
            )
        self.prompts = (prompt, *(class_prompts or ()))
        for given in self.prompts:
            if not isinstance(given, str):
                raise ValueError(f"prompt must be text, got {given!r}; put it in quotation marks")
        components = ("unet", "vae", "text_encoder", "text_encoder_2")
        self.root = loading.pipeline_folder(path, revision, components)
        self.name = Path(path).name
        self.config = loading.read_config(self.root / "unet", UNet2DConditionModel)
        self.vae_config = latents.read_config(self.root)
        self.is_sdxl = self.config["addition_embed_type"] == "text_time"
        self._check_config()
        self.prompt_length = text.prompt_length(self.root, encoders=1 + self.is_sdxl)
        index = loading.read_json(self.root / "model_index.json") if self.is_sdxl else {}
        self.empty_is_zeros = bool(index.get("force_zeros_for_empty_prompt", self.is_sdxl))
        self.noise_schedule = loading.load_schedule(self.root / "scheduler")
        self.configs: Mapping[str, Any] = {
            "unet": self.config,
            "vae": self.vae_config,
            "scheduler": loading.without_bookkeeping(
                self.root / "scheduler" / "scheduler_config.json"
            ),
            "prompts": self.prompts,
        }
        self.classes = len(self.prompts) - 1
        self.reduction = latents.reduction(self.vae_config)
        size = anatomy.height_width(self.config["sample_size"] or 0)
        high, wide = (self.reduction * side for side in size)
        self.image_size: int | tuple[int, int] | None = (high, wide) if high else None
        self.multiple = self.reduction  # the UNet itself takes latents of any size
        self.coarsest = self.reduction * 2 ** (len(self.config["block_out_channels"]) - 1)

    def _check_config(self) -> None:
        where = self.root / "unet" / "config.json"
        given, made = self.config["in_channels"], self.vae_config["latent_channels"]
        if given != made:
            raise ValueError(
                f"{where}: the UNet has {given} input channels, but the autoencoder has {made}; "
                "a teacher must see only the latents (no mask, no second image)"
            )
        width = self.config["cross_attention_dim"]
        if not isinstance(width, int):
            raise ValueError(
                f"{where}: cross_attention_dim must be one number, as in Stable Diffusion, "
                f"got {width!r}"
            )
        wrong = [key for key in UNCONDITIONED if self.config[key] is not None]
        if self.config["addition_embed_type"] not in (None, "text_time"):
            wrong.append("addition_embed_type")
        if wrong:
            raise ValueError(
                f"{where}: {wrong[0]} is {self.config[wrong[0]]!r}; a teacher's UNet must be "
                "conditioned as in Stable Diffusion 1.x, 2.x or SDXL"
            )

    def _text_widths(self) -> dict[str, int]:
        """Channels that the UNet expects of a prompt, by the encoders that give them."""
        widths = {"text_encoder": self.config["cross_attention_dim"]}
        if self.is_sdxl:
            widths = {"text_encoder and text_encoder_2": self.config["cross_attention_dim"]}
            # what the time_ids leave of the embedding's input
            pooled = self.config["projection_class_embeddings_input_dim"]
            widths["text_encoder_2, pooled"] = pooled - 6 * self.config["addition_time_embed_dim"]
        return widths

    def _check_text(self, prompts: text.Prompts) -> None:
        """Raises ValueError if the text encoders belong to another UNet."""
        for (encoder, width), given in zip(
            self._text_widths().items(), prompts.buffers(), strict=True
        ):
            if given.shape[-1] != width:
                raise ValueError(
                    f"{self.root}: {encoder} gives {given.shape[-1]} channels, but "
                    f"unet/config.json expects {width}; they are from different pipelines"
                )

    def build(self) -> nn.ModuleDict:
        """The parts without trained weights: UNet, autoencoder, and zeros for the prompts."""
        width, *pooled = self._text_widths().values()
        count = len(self.prompts)
        tokens = torch.zeros(count, self.prompt_length, width)
        return nn.ModuleDict(
            {
                "network": UNet2DConditionModel.from_config(self.config),
                "vae": AutoencoderKL.from_config(self.vae_config),
                "prompts": text.Prompts(tokens, torch.zeros(count, *pooled) if pooled else None),
            }
        )

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with trained weights and prompts; with a seed, the UNet's are fresh."""
        prompts = text.embed(self.root, self.prompts, encoders=1 + self.is_sdxl)
        self._check_text(prompts)
        if self.empty_is_zeros:
            empty = torch.tensor([not prompt for prompt in self.prompts])
            for embedded in prompts.buffers():
                embedded[empty] = 0
        if random_weights is None:
            network = loading.load_model(self.root / "unet", UNet2DConditionModel)
        else:
            network = loading.randomly(
                lambda: UNet2DConditionModel.from_config(self.config), random_weights
            )
        vae = loading.load_model(self.root / "vae", AutoencoderKL)
        return nn.ModuleDict({"network": network, "vae": vae, "prompts": prompts})

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """The input of the network: the latents, scaled."""
        return latents.encode(parts["vae"], images)

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run the UNet."""
        prompts: Any = parts["prompts"]
        # Which prompt each image gets, (B,): 0 is that of all, then the classes follow
        rows = (
            x.new_zeros(len(x), dtype=torch.int64) if labels is None else (labels + 1).clamp_min(0)
        )
        added = None
        if self.is_sdxl:
            height, width = (side * self.reduction for side in x.shape[-2:])
            # the size before and after cropping, and where: Podell et al. 2023, section 2.2
            sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device)
            added = {"text_embeds": prompts.pooled[rows], "time_ids": sizes.expand(len(x), 6)}
        return parts["network"](x, times, prompts.tokens[rows], added_cond_kwargs=added)

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """A module's map; blocks return it first in a tuple, transformers as (B, h w, C) tokens."""
        output = first_tensor(output)
        if not isinstance(output, Tensor) or output.ndim != 3:
            return output
        height, width = x.shape[-2:]
        while height * width > max(1, output.shape[1]):  # each level but the last one halves
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != output.shape[1]:
            return output  # tokens of the text
        return output.transpose(1, 2).reshape(len(output), -1, height, width)
