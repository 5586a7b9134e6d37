"""From next-token log-probabilities to a ranked list of real items."""
