"""What the relay pair costs: step by step, beside its peers, by lanes and sessions, and under QEMU, in one run."""
