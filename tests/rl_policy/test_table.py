"""The recorded table: to a file and back, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rl_policy.table import ReplayTable


def write(path: Path, **changes: object) -> Path:
    arrays = {
        "rewards": np.arange(6, dtype=np.float32).reshape(2, 3),
        "timesteps": np.array([0, 500, 999]),
        "contexts": np.array([[1.0], [2.0]], dtype=np.float32),
    } | changes
    save_file({name: array for name, array in arrays.items() if array is not None}, path)
    return path


def test_a_table_is_read_as_the_probe_writes_it(tmp_path: Path) -> None:
    table = ReplayTable.read(write(tmp_path / "table.safetensors"))
    assert (table.images, table.bins, table.context_size) == (2, 3, 1)
    assert table.timesteps is not None
    assert table.timesteps.tolist() == [0, 500, 999]
    assert table.observe(np.array([1, 0, 1])).tolist() == [[2], [1], [2]]
    assert table.earn(np.array([1, 0]), np.array([2, 1])).tolist() == [5, 1]


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = ReplayTable.read(write(tmp_path / "first.safetensors"))
    (tmp_path / "second.safetensors").write_bytes(table.to_bytes())
    again = ReplayTable.read(tmp_path / "second.safetensors")
    for name in ("rewards", "timesteps", "contexts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contexts": None}, "has no contexts; a replay table needs rewards, timesteps, contexts"),
        ({"timesteps": np.arange(4)}, r"one timestep per bin, shape \(3,\), got"),
        ({"rewards": np.full((2, 3), np.nan, np.float32)}, "the rewards .* must be finite"),
        ({"rewards": np.zeros((3, 3), np.float32)}, "same N images"),
        (
            {"rewards": np.zeros((2, 3), np.complex64)},
            "rewards must be real numbers, got complex64",
        ),
        ({"timesteps": np.array([2, 1, 0])}, "must be increasing, from 0 or more"),
        ({"timesteps": np.array([-1, 1, 2])}, "must be increasing, from 0 or more"),
        ({"timesteps": np.array([0, 0.5, 1])}, "must be whole numbers"),
        ({"timesteps": np.array([0, 1, np.nan])}, "must be whole numbers"),
    ],
)
def test_a_file_that_is_no_table_is_named(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = write(tmp_path / "table.safetensors", **changes)
    with pytest.raises(ValueError, match=f"table.safetensors.*{words}"):
        ReplayTable.read(path)


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(write(path).read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"table\.safetensors is damaged or not a safetensors file"
    ):
        ReplayTable.read(path)
    with pytest.raises(OSError, match=r"none\.safetensors"):
        ReplayTable.read(tmp_path / "none.safetensors")
    with pytest.raises(OSError, match=f"{tmp_path} is a folder; name a probe's table.safetensors"):
        ReplayTable.read(tmp_path)


@pytest.mark.parametrize(
    ("contexts", "rewards"),
    [((3, 2), (4, 5)), ((3, 2), (3,)), ((0, 2), (0, 5)), ((3, 2), (3, 0)), ((3, 0), (3, 5))],
)
def test_tables_that_do_not_fit_are_refused(
    contexts: tuple[int, ...], rewards: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="same N images"):
        ReplayTable(contexts=np.zeros(contexts, np.float32), rewards=np.zeros(rewards, np.float32))
