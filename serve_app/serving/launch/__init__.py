"""Starting Ray, deploying the locations, and ending both."""
