"""From a prepared dataset to a trained run."""
