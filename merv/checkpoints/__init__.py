"""The folder of a saved model: its format, the hub, its card, means of several."""
