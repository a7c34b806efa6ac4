"""The user's list: what it names, cut into shards."""
