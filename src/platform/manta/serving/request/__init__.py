"""A request of OpenAI's API: what it asks for, and what came of it."""
