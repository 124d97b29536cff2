"""A source to frames at chosen times, as an encoder wants them: open, sample, decode, transform."""
