"""The fuzzer is a program, not a test."""

collect_ignore_glob = ["fuzz_*.py"]
