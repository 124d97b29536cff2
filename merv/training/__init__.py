"""Training: the LightningModule, recipes, checkpoints, sharding, and planning a run."""
