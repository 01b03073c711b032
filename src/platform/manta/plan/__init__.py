"""What an action will do, as a frozen value, before it does it."""
