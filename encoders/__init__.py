"""The encoders of merv, one file each. They are registered in the same way as third-party encoders."""
