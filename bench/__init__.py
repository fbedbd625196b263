"""The opaque relay pair beside its peers: throughput, CPU, memory, round trip and set-up, in one interleaved run."""
