"""Small pipelines of latent diffusion with text, saved as diffusers saves them.

The pipelines' classes, and transformers, are slow to import: each builder imports its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

PROMPT_LENGTH = 11


def tiny_vae(**config: Any) -> AutoencoderKL:
    """It halves the sides; its latents have four channels."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.5,
        **config,
    )


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_tokenizer(folder: Path) -> Path:
    """CLIP's files, as they lie on the hub, for a vocabulary of letters and one pair."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "at</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    settings = {"model_max_length": PROMPT_LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def texts(folder: Path, encoders: int) -> dict[str, Any]:
    """The text components of a pipeline of Stable Diffusion, by their names."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=55,
        bos_token_id=53,
        eos_token_id=54,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        projection_dim=12,
    )
    found: dict[str, Any] = {
        "text_encoder": transformers.CLIPTextModel(config),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(write_tokenizer(folder)),
    }
    if encoders == 2:
        found["text_encoder_2"] = transformers.CLIPTextModelWithProjection(config)
        found["tokenizer_2"] = found["tokenizer"]
    return found


def tiny_unet(sdxl: bool = False, **config: Any) -> UNet2DConditionModel:
    if sdxl:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        config["projection_class_embeddings_input_dim"] = 12 + 6 * 4
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16 if sdxl else 8,
        **config,
    )


def save_sd1(folder: Path, prediction_type: str = "epsilon", **unet: Any) -> str:
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline(
        **texts(folder / "tokenizer", encoders=1),
        unet=tiny_unet(**unet),
        vae=tiny_vae(),
        scheduler=ddim(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def save_sd2(folder: Path) -> str:
    return save_sd1(folder, "v_prediction", use_linear_projection=True)


def save_sdxl(folder: Path, **settings: Any) -> str:
    from diffusers import StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        **texts(folder / "tokenizer", encoders=2),
        unet=tiny_unet(sdxl=True, use_linear_projection=True),
        vae=tiny_vae(),
        scheduler=ddim("epsilon"),
        add_watermarker=False,
        **settings,
    ).save_pretrained(folder)
    return str(folder)


def ddim(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=100,
        beta_start=0.00085,
        beta_end=0.12,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
    )


def without_texts(count: int) -> dict[str, None]:
    """Nothing in the text components' places: no flow teacher reads them."""
    suffixes = ("", "_2", "_3")[:count]
    return dict.fromkeys(f"{part}{s}" for part in ("text_encoder", "tokenizer") for s in suffixes)


def save_sd3(folder: Path) -> str:
    from diffusers import StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **without_texts(3),
    ).save_pretrained(folder)
    return str(folder)


def save_flux(folder: Path, guidance_embeds: bool = True) -> str:
    from diffusers import FluxPipeline

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    FluxPipeline(
        transformer=transformer,
        vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **without_texts(2),
    ).save_pretrained(folder)
    return str(folder)
