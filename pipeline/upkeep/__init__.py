"""Shows what a store holds, and deletes what nothing needs."""
