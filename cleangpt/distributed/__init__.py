"""One process among several, one model over several devices."""
