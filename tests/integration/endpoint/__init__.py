"""Tests of one running endpoint; being a package they share it, and it ends with the last."""
