"""The contract of an encoder: its base class, its weights, its windows of frames, encoders by name."""
