"""Running a model: cache, compiled programs, sampling."""
