"""The machines: a Ray runtime to run on, and what fits on it. Knows nothing of models or studies."""
