"""One store, in a folder: what S3 does is tested beside the stores."""

from tests.conftest import folder_store

store = folder_store
