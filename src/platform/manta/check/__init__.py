"""Rules over specs: each returns findings; none touches a network."""
