"""Prompts, embedded once by a pipeline's CLIP text encoders.

Only this module needs `transformers`, and only to embed prompts.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teachers import loading

MARK = re.compile(r"<.+>|\[.+\]")  # of begin, end, padding: no part of a word
CHUNK = 32  # prompts that go through an encoder at once, where there are a thousand classes


class Prompts(nn.Module):
    """Embedded prompts, as buffers: they move, are cast and are fingerprinted like weights.

    Args:
        tokens: (P, L, D), one row per prompt.
        pooled: (P, E), each prompt as one vector, if the model needs it.
    """

    tokens: Tensor
    pooled: Tensor | None

    def __init__(self, tokens: Tensor, pooled: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.register_buffer("pooled", pooled)


def prompt_length(pipeline: Path, encoders: int) -> int:
    """L, the number of tokens that every prompt is padded to; also checks that all files exist.

    Args:
        pipeline: its folder, with text_encoder/ and tokenizer/.
        encoders: 2 if it also has text_encoder_2/ and tokenizer_2/, else 1.

    Raises:
        OSError: one of these folders or its files is missing.
        ValueError: one of the files is damaged.
    """
    for suffix in ("", "_2")[:encoders]:
        loading.read_json(pipeline / f"text_encoder{suffix}" / "config.json")
        folder = pipeline / f"tokenizer{suffix}"
        loading.read_json(folder / "tokenizer_config.json")
        # transformers would go on with three tokens for all words
        if (folder / "tokenizer.json").is_file():
            loading.read_json(folder / "tokenizer.json")
        elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            _check_merges(folder)
        else:
            raise FileNotFoundError(
                f"no vocabulary in {folder}: expected vocab.json and merges.txt, or tokenizer.json"
            )
    lengths = []
    for suffix in ("", "_2")[:encoders]:
        for file, key in (
            (f"tokenizer{suffix}/tokenizer_config.json", "model_max_length"),
            (f"text_encoder{suffix}/config.json", "max_position_embeddings"),
        ):
            length = loading.read_json(pipeline / file).get(key, 77)
            if not isinstance(length, int | float) or length < 1:
                raise ValueError(f"{pipeline / file}: {key} must be a number, got {length!r}")
            lengths.append(length)
    return int(min(lengths))  # a tokenizer that knows no limit says so by an absurd one


def embed(pipeline: Path, prompts: Sequence[str], encoders: int) -> Prompts:
    """The prompts as the pipelines of Stable Diffusion embed them.

    One encoder gives its last layer, normalised (Rombach et al. 2022). Two give their last but one
    layers, concatenated, and the second one's projected text as `pooled` (Podell et al. 2023,
    section 2.1).

    Args:
        pipeline, encoders: see `prompt_length`.

    Raises:
        ValueError: no `transformers`, broken weights, or a prompt with too many tokens.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"transformers is not installed; {pipeline} needs it to read prompts: "
            "pip install 'diffusion-distill[text]'"
        ) from error
    length = prompt_length(pipeline, encoders)
    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    sides: list[Tensor] = []
    pooled: list[Tensor] = []
    for suffix, kind in list(zip(("", "_2"), kinds, strict=True))[:encoders]:
        tokens = _token_ids(pipeline / f"tokenizer{suffix}", prompts, length)
        encoder = _load_encoder(pipeline / f"text_encoder{suffix}", kind)
        if (largest := int(tokens.max())) >= (known := encoder.config.vocab_size):
            raise ValueError(
                f"{pipeline}: tokenizer{suffix} has a token {largest}, but text_encoder{suffix} "
                f"knows {known}; copy both from one pipeline"
            )
        rows = []
        for ids in torch.split(tokens, CHUNK):
            with torch.no_grad():
                output = encoder(ids, output_hidden_states=True)
            rows.append(output.last_hidden_state if encoders == 1 else output.hidden_states[-2])
            if suffix:
                pooled.append(output.text_embeds)
        sides.append(torch.cat(rows))
    return Prompts(torch.cat(sides, dim=-1), torch.cat(pooled) if pooled else None)


def _token_ids(folder: Path, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (P, L) int64 of each prompt, with start and end marks and padding."""
    from transformers import CLIPTokenizer
    from transformers.utils import logging as chatter

    try:
        with loading.quiet(chatter):
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            padded = tokenizer(list(prompts), padding="max_length", max_length=length)
        ids = [torch.tensor(row, dtype=torch.int64) for row in padded.input_ids]
    except Exception as error:  # its files may be wrong in any way at all
        raise ValueError(
            f"{folder} does not contain a CLIPTokenizer ({textwrap.shorten(str(error), 200)})"
        ) from error
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > length:
            raise ValueError(
                f"prompt {textwrap.shorten(prompt, 60)!r} has {len(row)} tokens, start and end "
                f"included; the text encoder reads at most {length}"
            )
    return torch.stack(ids)


def _check_merges(folder: Path) -> None:
    """Raises ValueError if merges.txt is cut and cannot produce all tokens of the vocabulary;
    transformers would not notice."""
    path = folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    pairs = [line.split() for line in lines]
    made = {"".join(pair) for pair in pairs}
    lost = [
        token
        for token in loading.read_json(folder / "vocab.json")
        if len(token.removesuffix("</w>")) > 1 and token not in made and not MARK.fullmatch(token)
    ]
    if lost:
        raise ValueError(
            f"{path} cannot produce {len(lost)} tokens of vocab.json beside it, such as "
            f"{lost[0]!r}; copy both again"
        )


def _load_encoder(folder: Path, kind: Any) -> Any:
    """A text encoder in float32, with all of its weights read from the file."""
    weights, variant = loading.find_weights(folder, "model.safetensors", "pytorch_model.bin")
    from transformers.utils import logging as chatter

    try:
        with loading.quiet(chatter):
            encoder, report = kind.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=".safetensors" in weights.name,
                variant=variant,
            )
    except Exception as error:  # its files may be wrong in any way at all
        raise ValueError(
            f"{folder} does not contain a {kind.__name__} with its weights "
            f"({textwrap.shorten(str(error), 200)})"
        ) from error
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{folder}: the weights do not match config.json beside them: {len(missing)} missing, "
            f"such as {min(missing)}"
        )
    loading.check_finite(encoder, folder)
    return encoder.float().eval()
