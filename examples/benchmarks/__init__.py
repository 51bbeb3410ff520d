"""Measurements of nemo_spin against what would be run in its place: `python -m examples.benchmarks NAME`."""
