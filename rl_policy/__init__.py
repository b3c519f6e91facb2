"""Choosing timesteps: one choice per image, learned from the reward that the choice earned.

`protocol` defines a policy; `simple`, `reinforce`, `bandits`, `sb3`, `dqn` and `soft_mix` have the
policies, and `progress` shows one how far training is. `reward` and `label_free` compute rewards;
`table` has recorded ones, and `environment` the problem as a gymnasium environment, registered
here by name. `drawing`, `bins` and `summary` turn distributions into indices, indices into
timesteps, and distributions into figures. None of them is imported here, as stable-baselines3
takes two seconds to load.
"""

import gymnasium

ENVIRONMENT_ID = "distill/TimestepSelection-v0"

gymnasium.register(
    id=ENVIRONMENT_ID,
    entry_point="rl_policy.environment:TimestepEnv",
    vector_entry_point="rl_policy.environment:TimestepVectorEnv",
)
