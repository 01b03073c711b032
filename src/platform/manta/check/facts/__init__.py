"""What the clouds and libraries know by name: facts, no rules."""
