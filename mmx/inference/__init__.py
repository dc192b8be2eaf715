"""Running a model: cache, engine, sampling, text and conversations."""
