"""Fine-tuning and training from nothing; see `__main__`."""
