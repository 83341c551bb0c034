"""Finished jobs in another audio format: `python -m jobs.render`."""
