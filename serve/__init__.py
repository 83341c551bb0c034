"""The HTTP endpoint on Ray Serve. Imports `higgs_model`, never `jobs`."""
