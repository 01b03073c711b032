"""The applications of a cluster: what they are and were, and one change of them at a time."""
