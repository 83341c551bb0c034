"""Fine-tuning and training from nothing: `command` prepares with `prepare`, and trains here or on a cluster."""

from jobs.train.cli import train as train
