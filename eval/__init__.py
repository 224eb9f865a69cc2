"""Benchmarks, scorers and fair comparison."""
