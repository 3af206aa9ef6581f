"""The worker: one memory-bounded model cache, and the threads that execute."""
