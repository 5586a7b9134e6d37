"""From an event log to a prepared dataset, and from there to deterministic global batches of histories."""
