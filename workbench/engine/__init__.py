"""Long work in shards: a job, the parts that it makes, and the keeper of those that are finished."""
