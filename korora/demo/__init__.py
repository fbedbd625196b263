"""`korora demo`: a real virtual machine migrates through two relays on this machine, and proves that it survived."""
