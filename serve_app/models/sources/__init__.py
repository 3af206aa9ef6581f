"""Where models come from: references become local files, and files become the tensors of a model."""
