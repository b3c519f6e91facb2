"""Every layout of a teacher's folder that loads, and one clear line for each that does not."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.utils import is_torchsde_available
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from teachers import loading
from teachers.diffusers_unet import diffusers_unet
from teachers.diffusion import DiffusionTeacher
from tests.teachers import pipelines

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(**config) -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **config,
    )


@pytest.fixture
def pipeline(tmp_path) -> Path:
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def load(folder: Path | str, **settings) -> DiffusionTeacher:
    return diffusers_unet(str(folder), layers=("mid_block",), **settings)


def fails(folder: Path | str, kind: type[Exception], pattern: str, **settings) -> None:
    """Loading raises `kind` with one line that matches."""
    with pytest.raises(kind, match=pattern) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value).strip()


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_all_layouts_give_the_same_teacher(pipeline, tmp_path):
    expected = load(pipeline).fingerprint
    flat = tmp_path / "flat"  # as google/ddpm-cifar10-32 on the hub
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    inside = tmp_path / "elsewhere" / "inside"
    shutil.copytree(pipeline / "unet", inside)
    shutil.copytree(pipeline / "scheduler", inside / "scheduler")
    for folder in (pipeline / "unet", flat, inside):
        assert load(folder).fingerprint == expected


def test_bin_weights_load_as_safetensors_do(pipeline):
    expected = load(pipeline).fingerprint
    weights = pipeline / "unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    assert load(pipeline).fingerprint == expected


def test_a_bin_that_runs_code_is_refused_without_running_it(pipeline, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (pipeline / "unet" / WEIGHTS).unlink()
    torch.save({"weight": Touch()}, pipeline / "unet" / "diffusion_pytorch_model.bin")
    fails(pipeline, ValueError, "diffusion_pytorch_model.bin is truncated")
    assert not (tmp_path / "ran").exists()


def test_attention_weights_under_their_old_names_load(pipeline):
    """The first pipelines on the hub call them query, key, value and proj_attn."""
    expected = load(pipeline).fingerprint
    weights = pipeline / "unet" / WEIGHTS
    renamed = {}
    for name, weight in load_file(weights).items():
        for new, old in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out.0": "proj_attn",
        }.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = weight
    assert any(".query." in name for name in renamed)
    save_file(renamed, weights)
    assert load(pipeline).fingerprint == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_take_no_more_memory_and_compute_as_asked(
    pipeline: Path, dtype: torch.dtype
) -> None:
    weights = pipeline / "unet" / WEIGHTS
    halves = {name: weight.to(dtype) for name, weight in load_file(weights).items()}
    save_file(halves, weights)
    assert loading.load_model(pipeline / "unet", UNet2DModel).dtype == dtype
    teacher = load(pipeline)
    assert teacher.network.dtype == torch.float32
    save_file({name: weight.float() for name, weight in halves.items()}, weights)
    assert load(pipeline).fingerprint == teacher.fingerprint
    save_file(halves | {"conv_out.bias": halves["conv_out.bias"].float()}, weights)
    assert loading.load_model(pipeline / "unet", UNet2DModel).dtype == torch.float32


def test_random_weights_need_no_weights_file(pipeline):
    (pipeline / "unet" / WEIGHTS).unlink()
    load(pipeline, random_weights=0)
    fails(pipeline, FileNotFoundError, rf"no weights in .*unet: expected {WEIGHTS}")


def test_loading_prints_and_logs_nothing(pipeline, capfd, caplog):
    edit(pipeline / "unet" / "config.json", a_key_of_the_future=1)
    with caplog.at_level(logging.INFO):
        load(pipeline, dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("diffusers")]


def test_missing_folder_says_what_to_give():
    fails("./nowhere/at/all", FileNotFoundError, "'./nowhere/at/all' is not a folder; give a local")


def test_empty_folder_says_what_to_give(tmp_path):
    fails(
        tmp_path, FileNotFoundError, r"there is no .*config\.json; give a local folder written by"
    )


def test_a_revision_of_a_folder_is_refused(tmp_path):
    fails(tmp_path, ValueError, "revision 'v9' is for hub ids, but .* leave it out", revision="v9")


def _offline(*args, **kwargs):
    raise LocalEntryNotFoundError("ConnectError: name not known\nsecond line")


@pytest.mark.parametrize("path", ["mine/ddmp", "mine/deep/ddmp"])
def test_a_folder_of_a_like_name_is_offered(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "snapshot_download", _offline)
    near = Path(path).with_name("ddpm")
    near.mkdir(parents=True)
    fails(path, OSError, f"not a (local )?folder .did you mean '{near}'")


def test_unreachable_hub_says_to_give_a_folder(monkeypatch):
    monkeypatch.setattr(loading, "snapshot_download", _offline)
    fails(
        "google/ddpm-cifar10-32",
        OSError,
        "not a local folder, and could not be fetched .*or give a local folder",
    )
    fails("google/ddpm-cifar10-32", OSError, "at revision 'v9'", revision="v9")


Fetched = Callable[[], set[str]]


@pytest.fixture
def hub(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """A hub that has `pipeline`, and which weights were fetched from it so far."""
    cache = tmp_path / "cache"

    def snapshot(
        hub_id: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert (hub_id, revision) == ("someone/tiny", "main")
        names = [str(path.relative_to(pipeline)) for path in pipeline.rglob("*.*")]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in filter_repo_objects(names, **patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pipeline / name, cache / name)
        return str(cache)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    return lambda: {path.name for path in cache.rglob("diffusion*")}


@pytest.mark.parametrize(
    ("kinds", "fetched"),
    [
        ([{}, {"safe_serialization": False}, {"variant": "fp16"}], WEIGHTS),
        ([{"safe_serialization": False}, {"variant": "fp16"}], "diffusion_pytorch_model.bin"),
        ([{"variant": "bf16"}], "diffusion_pytorch_model.bf16.safetensors"),
        ([{"variant": "fp16", "safe_serialization": False}], "diffusion_pytorch_model.fp16.bin"),
    ],
)
def test_the_best_weights_of_the_hub_are_fetched(
    pipeline: Path, hub: Fetched, kinds: list[dict[str, Any]], fetched: str
) -> None:
    expected = load(pipeline).fingerprint
    model = tiny_unet()
    model.load_state_dict(load_file(pipeline / "unet" / WEIGHTS))
    (pipeline / "unet" / WEIGHTS).unlink()
    for kind in [*kinds, {"variant": "non_ema"}]:
        model.save_pretrained(pipeline / "unet", **kind)
    assert load("someone/tiny", revision="main").fingerprint == expected
    assert hub() == {fetched}


def test_every_component_has_weights_of_its_own_kind(pipeline: Path, hub: Fetched) -> None:
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "diffusion_pytorch_model.fp16.bin").touch()
    loading.download("someone/tiny", "main", ("unet", "vae"))
    assert hub() == {WEIGHTS, "diffusion_pytorch_model.fp16.bin"}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_shards_load(
    pipeline: Path, capfd: pytest.CaptureFixture[str], variant: str | None, safe: bool
) -> None:
    expected = load(pipeline).fingerprint
    model = UNet2DModel.from_pretrained(pipeline / "unet")
    (pipeline / "unet" / WEIGHTS).unlink()
    capfd.readouterr()
    model.save_pretrained(
        pipeline / "unet", variant=variant, safe_serialization=safe, max_shard_size="20KB"
    )
    assert load(pipeline).fingerprint == expected
    assert capfd.readouterr() == ("", "")
    next((pipeline / "unet").glob("*-00002-*")).unlink()
    fails(pipeline, ValueError, r"\.index\.(fp16\.)?json is truncated")
    next((pipeline / "unet").glob("*.index.*")).write_text('{"weight_map": []}')
    fails(pipeline, ValueError, r"\.index\.(fp16\.)?json is truncated")


def test_missing_scheduler_is_not_guessed(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    fails(pipeline, FileNotFoundError, r"no scheduler_config\.json .*save")


def test_unfit_schedulers_are_refused(pipeline):
    EDMEulerScheduler().save_pretrained(pipeline / "scheduler")
    fails(pipeline, ValueError, r"scheduler_config\.json: .*has no alphas_cumprod")
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="DDPMSchedular")
    fails(pipeline, ValueError, "names 'DDPMSchedular', which is not a scheduler")
    edit(
        pipeline / "scheduler" / "scheduler_config.json",
        _class_name="DDPMScheduler",
        beta_schedule="x",
    )
    fails(pipeline, ValueError, r"scheduler_config\.json: x ")
    edit(
        pipeline / "scheduler" / "scheduler_config.json",
        beta_schedule="linear",
        num_train_timesteps=-5,
    )
    fails(pipeline, ValueError, r"scheduler_config\.json: number of steps must be non-negative")
    UniPCMultistepScheduler(use_flow_sigmas=True).save_pretrained(pipeline / "scheduler")
    fails(pipeline, ValueError, r"scheduler_config\.json: .* samples flow matching")
    EulerDiscreteScheduler(timestep_type="continuous").save_pretrained(pipeline / "scheduler")
    fails(pipeline, ValueError, r"scheduler_config\.json: .*timestep_type continuous")
    ddim = DDIMScheduler(rescale_betas_zero_snr=True)
    ddim.save_pretrained(pipeline / "scheduler")
    assert load(pipeline).noise_schedule.signal[-1] == 0
    HeunDiscreteScheduler.from_config(ddim.config).save_pretrained(pipeline / "scheduler")
    fails(pipeline, ValueError, "rescale_betas_zero_snr is true, but HeunDiscreteScheduler does")
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="DPMSolverSDEScheduler")
    if not is_torchsde_available():
        fails(pipeline, ValueError, "DPMSolverSDEScheduler needs the packages torch, torchsde")
    DDPMScheduler(prediction_type="score").save_pretrained(pipeline / "scheduler")
    fails(pipeline, ValueError, "prediction_type 'score'; it must be one of epsilon, ")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel"),
        ({"in_channels": 1}, r"has 1 input channels; a teacher needs 3 \(RGB\)"),
        ({"num_class_embeds": 10}, "class-conditional"),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 100},
            "learned embeddings of 100 timesteps, but the scheduler has 1000",
        ),
        (
            {"time_embedding_type": "fourier"},
            "logarithm of the timestep, which is undefined for t=0",
        ),
        (
            {"sample_size": [16, 16, 16]},
            r"sample_size must be a side, or height and width, got \[16, 16, 16\]",
        ),
        ({"down_block_types": ["DownBlock2D"]}, "does not describe a UNet2DModel: "),
        ({"block_out_channels": [7, 16]}, "does not describe a UNet2DModel: "),
        ({"block_out_channels": []}, "does not describe a UNet2DModel: "),
        ({"block_out_channels": [-8, 16]}, "does not describe a UNet2DModel: "),
        ({"norm_num_groups": 0}, "does not describe a UNet2DModel: "),
        ({"time_embedding_type": "x"}, "does not describe a UNet2DModel: "),
        ({"time_embedding_dim": 16}, rf"{WEIGHTS} is truncated or does not match"),
        ({"mid_block_type": None}, rf"{WEIGHTS} does not match config.json .* unexpected weights"),
        ({"block_out_channels": [16, 16]}, rf"{WEIGHTS} is truncated or does not match"),
    ],
)
def test_config_that_does_not_fit_names_the_file(pipeline, changes, pattern):
    edit(pipeline / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=pattern):
        diffusers_unet(str(pipeline), layers=("conv_in",))


def test_a_unet_of_latents_is_no_teacher_of_pixels(tmp_path):
    latent = LDMPipeline(
        vqvae=VQModel(norm_num_groups=4), unet=tiny_unet(), scheduler=DDIMScheduler()
    )
    latent.save_pretrained(tmp_path / "ldm")
    for folder in (tmp_path / "ldm", tmp_path / "ldm" / "unet"):
        pattern = r"ldm/model_index\.json: its UNet2DModel works on the latents .* works on pixels$"
        fails(folder, ValueError, pattern)


@pytest.mark.parametrize(("name", "family"), [("sd1", "stable_diffusion"), ("sd3", "flow")])
def test_a_pipeline_of_another_family_names_its_teacher(tmp_path, name, family):
    getattr(pipelines, f"save_{name}")(tmp_path / name)
    fails(
        tmp_path / name,
        ValueError,
        rf"works on the latents .*; a recipe reads it with teacher\.name={family}$",
    )


def test_files_that_are_no_folders_say_what_to_do(pipeline):
    file = pipeline / "unet" / WEIGHTS
    fails(file, FileNotFoundError, "is a single file; convert it to a folder")
    (pipeline / "unet" / "config.json").write_text('{"architecture": "vit_tiny"}')
    fails(
        pipeline,
        ValueError,
        "describes a vit_tiny of timm; .*with teacher.name=timm teacher.pa",
    )


def test_config_that_is_no_json_names_the_file(pipeline):
    (pipeline / "unet" / "config.json").write_text("{")
    fails(pipeline, ValueError, r"unet/config\.json is not JSON")


@pytest.mark.parametrize("kept", [0, 4, 2000])
def test_truncated_weights_name_the_file(pipeline, kept):
    weights = pipeline / "unet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:kept])
    fails(pipeline, ValueError, rf"unet/{WEIGHTS} is truncated")


def test_weights_that_are_a_text_file_name_the_file(pipeline):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (pipeline / "unet" / WEIGHTS).write_text(pointer)
    fails(pipeline, ValueError, rf"unet/{WEIGHTS} is truncated or .*git-lfs")


def test_weights_that_are_not_finite_name_file_and_weight(pipeline):
    weights = load_file(pipeline / "unet" / WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, pipeline / "unet" / WEIGHTS)
    fails(pipeline, ValueError, rf"{WEIGHTS}: conv_in\.weight has values that are not finite")


def test_missing_weights_name_the_file_and_the_weights(pipeline):
    weights = load_file(pipeline / "unet" / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, pipeline / "unet" / WEIGHTS)
    fails(
        pipeline, ValueError, rf"{WEIGHTS} does not match .*: 1 missing weights, such as conv_out"
    )
