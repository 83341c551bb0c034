"""Fine-tuning and training from scratch; `cli` prepares the data with `prepare`, then trains in-process or on Ray."""

from jobs.train.cli import train as train
