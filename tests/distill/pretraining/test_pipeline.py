"""A trained teacher's folder: what loads it, and what becomes of an older one."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from distill.pretraining.pipeline import save_pipeline
from teachers import ddpm
from teachers.diffusers_unet import diffusers_unet


def tiny_unet() -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ddpm.build_unet(image_size=16, block_out_channels=(8, 16), attention_levels=(1,))


def test_saved_pipeline_loads_in_diffusers_and_as_a_teacher(tmp_path):
    unet, scheduler = tiny_unet(), DDPMScheduler(prediction_type="v_prediction", beta_end=0.03)
    save_pipeline(unet, scheduler, tmp_path / "made" / "teacher")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "made" / "teacher")
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.beta_end == 0.03
    teacher = diffusers_unet(str(tmp_path / "made" / "teacher"), layers=("mid_block",))
    assert teacher.noise_schedule.prediction_type == "v_prediction"
    assert teacher.features(torch.rand(4, 3, 16, 16), torch.arange(4))["mid_block"].shape == (
        4,
        16,
        8,
        8,
    )


def test_others_may_read_a_saved_pipeline_as_far_as_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "teacher")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "teacher").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_the_memory_format_of_training_is_not_saved(tmp_path):
    unet = tiny_unet().to(memory_format=torch.channels_last)
    save_pipeline(unet, DDPMScheduler(), tmp_path / "teacher")
    for weight in DDPMPipeline.from_pretrained(tmp_path / "teacher").unet.parameters():
        assert weight.is_contiguous()
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_file_is_half_the_size_and_leaves_the_model_alone(tmp_path):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    save_pipeline(unet, scheduler, tmp_path / "full")
    save_pipeline(unet, scheduler, tmp_path / "half", dtype=torch.float16)
    weights = "unet/diffusion_pytorch_model.safetensors"
    full, half = ((tmp_path / name / weights).stat().st_size for name in ("full", "half"))
    assert half < 0.7 * full
    assert unet.dtype == torch.float32
    unet, _ = ddpm.load_pipeline(str(tmp_path / "half"), (16, 16))
    assert unet.dtype == torch.float32  # to be trained further
    assert unet.training


def test_saved_pipeline_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    save_pipeline(unet, scheduler, tmp_path / "teacher")
    with torch.no_grad():
        unet.conv_in.bias.fill_(7)
    save_pipeline(unet, scheduler, tmp_path / "teacher")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "teacher")
    assert loaded.unet.conv_in.bias.eq(7).all()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_older_pipeline_survives_a_save_that_fails(tmp_path, monkeypatch):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    save_pipeline(unet, scheduler, tmp_path / "teacher")
    before = {p: p.read_bytes() for p in (tmp_path / "teacher").rglob("*") if p.is_file()}

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_pipeline(unet, scheduler, tmp_path / "teacher")
    after = {p: p.read_bytes() for p in (tmp_path / "teacher").rglob("*") if p.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_older_pipeline_survives_an_interrupt_between_the_renames(tmp_path, monkeypatch):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    save_pipeline(unet, scheduler, tmp_path / "teacher")
    rename = Path.rename

    def interrupt(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(unet, scheduler, tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model_index.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(FileExistsError, match="photos exists and is not a diffusers pipeline"):
        save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_weights_that_overflow_are_not_saved(tmp_path):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"conv_in\.bias has values .* torch\.float16; not saved"):
        save_pipeline(unet, DDPMScheduler(), tmp_path / "teacher", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # configs fit, weights do not
    try:
        with pytest.raises(OSError, match=r"cannot write .*teacher: .*too large"):
            save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_saved_configs_name_no_path_of_the_training_machine(tmp_path):
    save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "first")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "first")
    save_pipeline(loaded.unet, loaded.scheduler, tmp_path / "second")
    for path in (tmp_path / "second").rglob("*.json"):
        assert str(tmp_path) not in json.dumps(json.loads(path.read_text()))
