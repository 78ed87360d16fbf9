"""Results of candidates and of a search as plain data, and their statistics."""
