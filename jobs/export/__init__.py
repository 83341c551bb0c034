"""Exports a finished job's results: `python -m jobs.export`."""
