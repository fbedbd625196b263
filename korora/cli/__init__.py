"""The commands, one module each; a module imports what it needs when it runs, so that `korora --help` stays quick."""
