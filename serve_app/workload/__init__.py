"""Request streams: the models that users of the locations request, and when. Every stream has a seed and repeats."""
