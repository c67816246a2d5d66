"""The mathematics: states, schedules, processes, sampling, pipelines, rewards and selections.

Imports torch and the standard library only. Time `t` is a noise level in [0, 1]: 0 is data, 1 is
noise; `s` is always the less noisy of two levels, `s < t`. States are tensors or dicts of tensors
with the batch on dimension 0.
"""
