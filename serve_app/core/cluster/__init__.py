"""The state of the cluster: reports of workers, who holds what, how popular each model is."""
