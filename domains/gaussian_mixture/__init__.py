"""Mixtures of Gaussians with a closed-form denoiser: the test bench of processes and algorithms."""
