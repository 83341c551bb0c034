"""`python -m jobs.export`: a finished job's results as the files that training tools and players read."""
