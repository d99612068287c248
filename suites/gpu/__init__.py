"""What only a GPU can show, in one command: see ``__main__``."""
