"""Gaussian mixtures in closed form: their density and their exact denoiser."""
