"""Fetches what references name, politely and within limits."""
