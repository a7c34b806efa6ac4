"""A trained bundle behind OpenAI's image API and a page, on Ray Serve."""
