"""What only a GPU shows: `python -m benchmarks.gpu`, a part of `make gpu`."""
