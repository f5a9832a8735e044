"""What tests of several rooms share and that is no fixture; pytest puts ``tests/`` on the path (``pyproject.toml``)."""
