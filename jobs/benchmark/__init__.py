"""Benchmarks: each runs this repository and its peer alternately in one run, and reports the ratio."""
