"""What `distill probe` reads and writes: images in a fixed order, and the files of its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from distill import checkpoint
from distill.config import RunConfig
from distill.data import Augmented, Draw, loader
from distill.errors import UserError
from distill.probing import map_picture
from distill.probing.layer_map import ProbeResult
from distill.probing.linear_probe import Batches
from distill.probing.map_report import Column, LayerMap
from distill.recipe import to_yaml
from rl_policy.table import ReplayTable


def _short(value: object, most: int = 60) -> str:
    """Python's text of a value, the end of a long one left out."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


class ProbeImages(NamedTuple):
    """Examples with fixed augmentation: every read of an index gives the same view."""

    examples: Augmented
    indices: list[int]

    def batches(self, size: int, workers: int) -> Batches:
        parts = [self.indices[i : i + size] for i in range(0, len(self.indices), size)]
        return loader(self.examples, [[Draw(i, 0) for i in part] for part in parts], workers)


class Columns:
    """The finished columns of a map, on the disk after each of them.

    Args:
        path: The file; what it holds is gone on with.
        settings: All that decides the figures.

    Raises:
        UserError: The file was written with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.columns: dict[tuple[str, int, int], Column] = {}
        if not path.exists():
            return
        state = checkpoint.load(path, "settings", "columns")
        written = state["settings"]
        for key, value in settings.items():
            if written.get(key) != value:
                was = _short(written.get(key))
                raise UserError(
                    f"{path} was made with another {key}: {was}, but now it is "
                    f"{_short(value)}; use the same, or choose another --out"
                )
        self.columns = {
            tuple(key): {layer: ProbeResult(**cell) for layer, cell in column.items()}
            for key, column in state["columns"]
        }

    def add(self, key: tuple[str, int, int], column: Column) -> None:
        """Keep the column of (weights, seed, timestep)."""
        self.columns[key] = column
        columns = [
            (key, {layer: cell._asdict() for layer, cell in column.items()})
            for key, column in self.columns.items()
        ]
        checkpoint.save(self.path, {"settings": self.settings, "columns": columns})


def write_map(folder: Path, config: RunConfig, found: LayerMap, figures: dict[str, Any]) -> None:
    """Write probe.json, probe.csv, probe.png, best.yaml and table.safetensors.

    Args:
        folder: The probe's folder, which exists.
        config: The recipe that was probed.
        found: The scores of every layer at every timestep.
        figures: All that goes into the JSON.
    """
    checkpoint.write_text(folder / "probe.json", json.dumps(figures, indent=2) + "\n")
    checkpoint.write_text(folder / "probe.csv", found.csv())
    map_picture.layer_map(folder / "probe.png", found)
    checkpoint.write_text(folder / "best.yaml", to_yaml(best_recipe(config, found)))
    rewards, rewarded = found.best_rewards
    table = ReplayTable(
        rewards=rewards.float().numpy(),
        timesteps=found.timesteps.numpy(),
        contexts=found.contexts[rewarded].float().numpy(),
    )
    with checkpoint.replacing(folder / "table.safetensors") as file:
        file.write(table.to_bytes())


def best_recipe(config: RunConfig, found: LayerMap) -> RunConfig:
    """The recipe with the best layer on the teacher's side of all pairs, at the best timestep."""
    pairs = []
    for pair in config.pairs:
        moved = pair.teacher != found.best_layer and pair.projector == "none"
        projector = "auto" if moved else pair.projector  # the layer may have other channels
        pairs.append(dataclasses.replace(pair, teacher=found.best_layer, projector=projector))
    timestep = found.best_timestep
    policy = dataclasses.replace(
        config.policy,
        name="fixed",
        bins=1,
        spacing="linear",
        lowest=timestep,
        highest=timestep,
        reward_layer=None,
        options={},
    )
    options = dict(config.teacher.options)
    if members := options.get("members"):  # those of an ensemble that the best layer is made of
        named = {part.partition("/")[0] for part in found.best_layer.split("+")}
        options["members"] = {name: members[name] for name in members if name in named}
    # A cache is one of other layers and timesteps
    teacher = dataclasses.replace(config.teacher, cache=None, options=options)
    return dataclasses.replace(
        config, name=f"{config.name}-best", pairs=pairs, policy=policy, teacher=teacher
    )
