"""Read videos for encoders without running them, and store the features that encoders compute."""
