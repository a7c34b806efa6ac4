import pytest

EVERY_KIND = ["folder", *(pytest.param(kind, marks=pytest.mark.integration) for kind in ("s3", "cloud"))]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of stores run on one of every kind."""
    if "make_store" in metafunc.fixturenames:
        metafunc.definition.add_marker(pytest.mark.parametrize("make_store", EVERY_KIND, indirect=True))
