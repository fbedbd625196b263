"""`korora xl` hands its pipes to the daemon: what both say to one another, and each one's part in it."""
