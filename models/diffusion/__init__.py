"""Diffusion mathematics as pure functions: schedules, process, samplers, guidance."""
