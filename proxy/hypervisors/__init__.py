"""What the relay asks of the local hypervisor about one virtual machine: start it, destroy it, revive it."""
