"""Processes that do jobs of a search, and what starts them."""
