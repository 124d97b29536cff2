"""MultiEncoder, VideoLLM and their parts, and the conversion of released MERV checkpoints."""
