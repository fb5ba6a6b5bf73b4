"""What a run did: events of its workers, the log of a run, and the report made from it."""
