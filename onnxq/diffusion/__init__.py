"""Denoisers: schedules, trajectories, timesteps in groups, and what quantization does along a trajectory."""
