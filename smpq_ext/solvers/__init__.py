"""Solvers: a score table and a budget in, an assignment out; one file, one class each."""
