"""What every test shares: one thread a worker, no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# The suite runs on all cores already; more threads a worker only make them wait for each other.
torch.set_num_threads(1)
