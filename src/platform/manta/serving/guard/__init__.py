"""In front of every LLM application: keys, limits, bounds, and what is told of it."""
