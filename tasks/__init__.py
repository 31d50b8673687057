"""The stages of the pipeline, their cache, and who records what: one room above `camera`, no mathematics."""
