"""Domains: what the algorithms are run on, each with its own pipeline, data and rewards."""
