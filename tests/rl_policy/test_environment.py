"""The environment under the checkers of gymnasium and stable-baselines3, replayed and live."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from stable_baselines3 import A2C

from rl_policy import ENVIRONMENT_ID
from rl_policy.environment import TimestepEnv
from rl_policy.table import ReplayTable

IMAGES, CONTEXT, BINS = 12, 3, 5


@pytest.fixture
def table() -> ReplayTable:
    random = np.random.default_rng(0)
    rewards = random.normal(size=(IMAGES, BINS)).astype(np.float32)
    rewards[:, 3] += 4
    return ReplayTable(
        contexts=random.normal(size=(IMAGES, CONTEXT)).astype(np.float32), rewards=rewards
    )


class LiveCounter:
    """A live source in small: its rewards change with every step of distillation it has done."""

    images, context_size, bins = IMAGES, CONTEXT, BINS

    def __init__(self) -> None:
        self.steps = 0

    def observe(self, images: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.full((len(images), CONTEXT), self.steps, np.float32)

    def earn(self, images: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.float32]:
        self.steps += 1
        return (bins + self.steps).astype(np.float32)


@pytest.mark.filterwarnings("error")
def test_environment_passes_the_check_of_gymnasium(table: ReplayTable) -> None:
    environment = gymnasium.make(ENVIRONMENT_ID, source=table)
    check_env(environment.unwrapped, skip_render_check=True)


@pytest.mark.filterwarnings("error")
def test_environment_passes_the_check_of_stable_baselines3(table: ReplayTable) -> None:
    stable_baselines3.common.env_checker.check_env(TimestepEnv(table))


@pytest.mark.parametrize("action", [-1, BINS, 0.5])
def test_an_action_that_is_no_bin_is_refused(table: ReplayTable, action: float) -> None:
    environment = TimestepEnv(table)
    environment.reset(seed=0)
    with pytest.raises(gymnasium.error.InvalidAction, match="expected 1 whole numbers from 0 to 4"):
        environment.step(np.asarray(action))  # type: ignore[arg-type]


def test_a_batch_of_environments_wants_an_action_each(table: ReplayTable) -> None:
    environments = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=4, source=table)
    environments.reset(seed=0)
    with pytest.raises(
        gymnasium.error.InvalidAction, match="expected 4 whole numbers from 0 to 4 as actions, got"
    ):
        environments.step(np.array([0]))


def test_replay_gives_the_table_and_ends_after_one_step(table: ReplayTable) -> None:
    environment = TimestepEnv(table)
    context, info = environment.reset(seed=4)
    np.testing.assert_array_equal(context, table.contexts[info["image"]])
    _, reward, terminated, truncated, after = environment.step(np.int64(2))
    assert reward == table.rewards[info["image"], 2]
    assert (terminated, truncated, after) == (True, False, info)
    with pytest.raises(gymnasium.error.ResetNeeded):
        environment.step(np.int64(2))


def test_seeded_resets_draw_the_same_images_and_all_of_them(table: ReplayTable) -> None:
    def images(seed: int) -> list[int]:
        environment = TimestepEnv(table)
        first = environment.reset(seed=seed)[1]["image"]
        return [first] + [environment.reset()[1]["image"] for _ in range(100)]

    assert images(1) == images(1) != images(2)
    assert set(images(1)) == set(range(IMAGES))


def test_one_environment_step_is_one_live_step() -> None:
    environment = TimestepEnv(LiveCounter())
    seen = []
    for _ in range(3):
        context, _ = environment.reset()
        seen.append((context[0], environment.step(np.int64(1))[1]))
    assert seen == [(0, 2), (1, 3), (2, 4)]


def test_plain_a2c_from_outside_learns_on_it(table: ReplayTable) -> None:
    environment = gymnasium.make(ENVIRONMENT_ID, source=table)
    model = A2C("MlpPolicy", environment, gamma=0.0, n_steps=16, seed=0, device="cpu")
    model.learn(2_000)
    chosen, _ = model.predict(table.contexts, deterministic=True)
    assert chosen.tolist() == [3] * IMAGES


@pytest.mark.filterwarnings("error")
def test_the_vectorised_twin_steps_all_images_at_once(table: ReplayTable) -> None:
    environment = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=7, source=table)
    contexts, info = environment.reset(seed=4)
    assert environment.observation_space.contains(contexts)
    np.testing.assert_array_equal(contexts, table.contexts[info["image"]])
    actions = np.arange(7) % BINS
    assert environment.action_space.contains(actions)
    after, rewards, terminated, truncated, ended = environment.step(actions)
    np.testing.assert_array_equal(rewards, table.rewards[info["image"], actions])
    np.testing.assert_array_equal(ended["final_obs"], contexts)
    np.testing.assert_array_equal(ended["final_info"]["image"], info["image"])
    assert terminated.all()
    assert not truncated.any()
    # The next images are drawn in the same step
    np.testing.assert_array_equal(after, table.contexts[ended["image"]])
    np.testing.assert_array_equal(
        environment.step(actions)[1], table.rewards[ended["image"], actions]
    )


def test_the_vectorised_twin_is_seeded_and_speaks_as_gymnasiums_own(table: ReplayTable) -> None:
    def run(seed: int) -> tuple[list[int], set[str], dict[str, object]]:
        twin = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=7, source=table)
        images = [*twin.reset(seed=seed)[1]["image"]]
        for _ in range(20):
            *_, info = twin.step(np.zeros(7, dtype=np.int64))
            images += [*info["image"]]
        return images, set(info), twin.metadata

    assert run(1)[0] == run(1)[0] != run(2)[0]
    assert set(run(1)[0]) == set(range(IMAGES))
    own = gymnasium.make_vec(
        ENVIRONMENT_ID,
        num_envs=7,
        source=table,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": run(1)[2]["autoreset_mode"]},
    )
    own.reset()
    *_, info = own.step(np.zeros(7, dtype=np.int64))
    assert run(1)[1] == set(info) - {"_image"}  # which masks images that every step has


def test_importing_rl_policy_registers_it_and_loads_no_agent(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    ones = ReplayTable(contexts=np.ones((2, 1), np.float32), rewards=np.ones((2, 3), np.float32))
    path.write_bytes(ones.to_bytes())
    code = (
        "import sys, gymnasium, rl_policy\n"
        f"print('{ENVIRONMENT_ID}' in gymnasium.registry)\n"
        "print({'torch', 'stable_baselines3'} & sys.modules.keys())\n"
        f"print(gymnasium.make('{ENVIRONMENT_ID}', source={str(path)!r}).action_space)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "set()", "Discrete(3)"]
