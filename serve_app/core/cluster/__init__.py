"""The state of the cluster: reports of workers, holders of models, popularity."""
