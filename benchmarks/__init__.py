"""CleanGPT against its peers and limits: `python -m benchmarks [NAME ...]`; see README.md."""
