"""The scripts in benchmarks/, run on tiny shapes."""
