"""The HTTP endpoint on Ray Serve. It imports `higgs_model`, never `jobs`."""
