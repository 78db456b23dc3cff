"""The homes of the integration tests."""

from tests.integration.conftest import home, shared_home

__all__ = ["home", "shared_home"]
