"""Commands: batch synthesis on Ray Data, benchmarks, training. They import `higgs_model`, never `serve`."""
