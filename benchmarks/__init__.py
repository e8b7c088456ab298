"""Models, data and benchmarks: ours beside the baseline in one run."""
