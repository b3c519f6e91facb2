"""What may be wrong with the text encoders and tokenizers of a pipeline: each is one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teachers.stable_diffusion import TextUNet, stable_diffusion
from tests.teachers import pipelines

Copied = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pipelines, for reading only."""
    root = tmp_path_factory.mktemp("pipelines")
    pipelines.save_sd1(root / "sd1")
    pipelines.save_sdxl(root / "sdxl")
    return root


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Copied:
    """A pipeline of one's own, to break."""

    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return copy


def fails(path: Path, kind: type[Exception], pattern: str) -> None:
    """Building raises `kind` with one line that matches."""
    with pytest.raises(kind, match=pattern) as caught:
        stable_diffusion(str(path), layers=("mid_block",))
    assert "\n" not in str(caught.value).strip()


def test_missing_vocabulary_is_named(copied: Copied) -> None:
    folder = copied("sd1")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    fails(folder, FileNotFoundError, r"no vocabulary in .*/tokenizer: .* vocab\.json and merges")


def test_damaged_text_files_are_one_line(copied: Copied) -> None:
    def broken(name: str, content: str, pattern: str) -> None:
        folder = copied("sd1")
        shutil.rmtree(folder / "tokenizer")
        pipelines.write_tokenizer(folder / "tokenizer")
        (folder / name).write_text(content, encoding="latin-1")
        fails(folder, ValueError, pattern)

    broken("tokenizer/vocab.json", '{"a": 0, "b"', r"tokenizer/vocab\.json is not JSON")
    broken("tokenizer/vocab.json", "{}", r"/tokenizer does not contain a CLIPTokenizer \(")
    broken("tokenizer/tokenizer.json", "", r"tokenizer/tokenizer\.json is not JSON")
    broken("tokenizer/tokenizer.json", "{}", r"/tokenizer does not contain a CLIPTokenizer \(")
    for cut in ("", "#version: 0.2\n"):  # prompts would fall into other tokens
        pattern = r"merges\.txt cannot produce 1 tokens of vocab\.json .* such as 'at</w>'"
        broken("tokenizer/merges.txt", cut, pattern)
    broken("tokenizer/merges.txt", "\xff", r"/tokenizer/merges\.txt is damaged \('utf-8' codec")
    for wrong in ({"hidden_size": "x"}, {"num_attention_heads": 0}, {"num_hidden_layers": None}):
        folder = copied("sd1")
        pipelines.edit(folder / "text_encoder" / "config.json", **wrong)
        fails(
            folder, ValueError, r"/text_encoder does not contain a CLIPTextModel with its weights"
        )


def test_text_encoders_of_another_unet_are_refused(copied: Copied) -> None:
    import transformers

    config = transformers.CLIPTextConfig.from_pretrained(copied("sd1") / "text_encoder")
    config.hidden_size = config.intermediate_size = 12
    folder = copied("sd1")
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    fails(
        folder, ValueError, r"text_encoder gives 12 channels, but unet/config\.json expects 8; they"
    )
    folder = copied("sdxl")
    config.hidden_size, config.projection_dim = 8, 44
    other = transformers.CLIPTextModelWithProjection(config)
    other.save_pretrained(folder / "text_encoder_2")
    fails(
        folder,
        ValueError,
        r"text_encoder_2, pooled gives 44 channels, but unet/config\.json expects",
    )


def test_a_tokenizer_of_another_pipeline_is_refused(copied: Copied) -> None:
    folder = copied("sd1")
    import transformers

    config = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.vocab_size = 3
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    fails(folder, ValueError, r"tokenizer has a token \d+, but text_encoder knows 3; copy both")


def test_prompts_are_as_long_as_the_shorter_of_two_encoders_reads(copied: Copied) -> None:
    folder = copied("sdxl")
    pipelines.edit(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=7)
    assert TextUNet(str(folder)).prompt_length == 7


def test_missing_and_broken_text_weights_are_named(copied: Copied) -> None:
    folder = copied("sd1")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails(folder, ValueError, r"/text_encoder does not contain a CLIPTextModel with its weights")
    weights.unlink()
    fails(folder, FileNotFoundError, r"/text_encoder: expected model\.safetensors$")
    folder = copied("sdxl")
    pipelines.edit(folder / "text_encoder_2" / "config.json", num_hidden_layers=3)
    fails(folder, ValueError, r"/text_encoder_2: the weights do not match .* missing, such as ")
