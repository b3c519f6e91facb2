"""Choosing timesteps: one choice an image, learned from the reward that the choice earned.

`protocol` says what a policy is; `simple`, `reinforce`, `bandits`, `sb3`, `dqn` and `soft_mix` hold
the policies, and `progress` shows one of them how far training is; `reward` and `label_free` say
what a choice earns; `table` holds recorded rewards, and `environment` the same problem as a
gymnasium environment, registered here by name alone; `drawing`, `bins` and `summary` turn
distributions into indices, indices into timesteps, and distributions into figures. None of them is
imported here: stable-baselines3 takes two seconds to load.
"""

import gymnasium

ENVIRONMENT_ID = "distill/TimestepSelection-v0"

gymnasium.register(
    id=ENVIRONMENT_ID,
    entry_point="rl_policy.environment:TimestepEnv",
    vector_entry_point="rl_policy.environment:TimestepVectorEnv",
)
