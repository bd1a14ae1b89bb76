"""A run's directory, and what a person sees of the run."""
