"""What is known of candidates and of a search, as plain data, and the statistics of it."""
