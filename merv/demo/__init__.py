"""The demo: generate clips with known content, train on them, and evaluate the model."""
