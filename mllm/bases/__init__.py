"""Base models: what tells one from another, and those that are put together from packages."""
