"""A trained bundle behind OpenAI's image API and a page: in one process, or with replicas on Ray."""
