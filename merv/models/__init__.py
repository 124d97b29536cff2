"""MultiEncoder and VideoLLM, and what they are made of; the released MERV's checkpoints."""
