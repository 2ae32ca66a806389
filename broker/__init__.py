"""A durable, ordered log of events and its live fan-out; it knows nothing of learning."""
