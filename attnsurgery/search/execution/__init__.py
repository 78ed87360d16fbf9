"""What a worker does: assembles model and data, measures, trains, scores, judges."""
