"""The workers of a search: pools, processes that do jobs, and launchers that start them."""
