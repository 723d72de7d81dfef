"""The servers' own files are no tests."""

collect_ignore_glob = ["with_*.py"]
