"""CleanGPT on one GPU: what is correct, how fast, and how good the plans are; `python -m benchmarks.gpu`."""
