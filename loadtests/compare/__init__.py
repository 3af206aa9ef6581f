"""EdgeServe beside what else serves many models from little memory: ``python -m loadtests.compare``."""
