"""Benchmarks: each measures ours and its peer in the same run, in turn, and quotes the ratio."""
