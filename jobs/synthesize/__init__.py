"""The batch job: `python -m jobs.synthesize`."""
