from tests.pipeline.training.conftest import shared_world  # noqa: F401  # the same small world
