"""What is read for encoders without running them, and the features that are kept."""
