"""Turn a video source into the frames that an encoder expects: open, sample, decode, preprocess."""
