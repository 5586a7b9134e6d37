"""Item-level ranking metrics over the full catalogue, their uncertainty, and the evaluation of a run."""
