"""The work of a worker: assembles model and data, measures, trains and scores candidates."""
