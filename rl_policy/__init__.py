"""Choosing timesteps: one choice an image, learned from the reward that the choice earned.

`protocol` says what a policy is; `simple`, `reinforce` and `sb3` hold the policies; `reward` the
reward head and running scales; `environment` the same problem as a gymnasium environment; `bins`
and `summary` turn indices into timesteps and distributions into figures. Nothing is imported here:
stable-baselines3 takes two seconds to load.
"""
