"""Estimators of Shapley values: one file, one class each; they see a Game and nothing else."""
