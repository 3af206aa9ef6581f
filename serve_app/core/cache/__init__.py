"""The model cache of one worker: which models are in memory, and which must go."""
