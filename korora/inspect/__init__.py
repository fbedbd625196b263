"""What is in a captured or saved migration stream, and what each technique would make of it."""
