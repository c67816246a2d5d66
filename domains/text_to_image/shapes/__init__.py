"""Shapes: a procedural text-to-image world with GenEval's six tasks in miniature."""
