"""A new version beside the running one, judged before it takes over."""
