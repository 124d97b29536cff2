"""The LightningModule and its run: recipes, checkpoints, several processes, what a run will take."""
