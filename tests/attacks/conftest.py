"""The attacks share the end-to-end tests' mesh: what is attacked is the whole thing."""

from tests.e2e.conftest import mesh

__all__ = ["mesh"]
