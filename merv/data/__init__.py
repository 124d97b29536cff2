"""Read samples from files, check them, and load them in batches that can be resumed."""
