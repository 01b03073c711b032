"""Serve applications: safe apply, and the builder that finds Manta's models."""
