"""The coordinator: the process that chooses candidates, gives out work, records results and confirms the winner."""
