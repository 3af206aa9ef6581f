"""What deploys EdgeServe. A package only so that ``python -m deploy.testbed`` is found; it is not installed."""
