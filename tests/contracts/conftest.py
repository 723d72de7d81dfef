"""The worker is a program, not a test."""

collect_ignore_glob = ["*_worker.py"]
