"""Benchmarks of speed, run from a checkout: `python -m benchmarks.engine`."""
