"""Diffusion in pure tensors: `schedule` (β), `process` (q and its conversions), `objectives` (losses).

Nothing here draws a random number, knows a network or reads a config: noise and t come in as arguments.
"""
