"""Ways to start a cluster, one file each, and the credentials that close it."""
