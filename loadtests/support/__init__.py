"""What benchmarks share: clients, contenders, deployments, synthetic clusters."""
