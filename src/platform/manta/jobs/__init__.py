"""Work on a cluster, through Ray's own job API."""
