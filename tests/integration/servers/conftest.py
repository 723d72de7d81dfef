"""Keeps pytest from collecting the servers' files as tests."""

collect_ignore_glob = ["with_*.py"]
