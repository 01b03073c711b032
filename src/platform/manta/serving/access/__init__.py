"""Who may ask what, and how much: API keys, their limits, and what was used."""
