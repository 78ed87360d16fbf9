"""What scripts/bench/gpu is made of: steps with time limits, rows that are written at once, tables made of the rows."""
